"""What torch.save's pickles describe, told without running anything in them.

A loop that knows some forty operations of the pickle machine, calls nothing that a file names and sets nothing on
anything. It makes numbers, texts, lists, tuples, `Pairs` and descriptions of tensors. Each operation does work in
proportion to what it consumes, and their number is bounded; nothing is hashed or compared but texts.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch

# Each several times what the largest published files need.
MAX_OPERATIONS = 1 << 20  # a network with its optimizer's state takes some 50,000
MAX_TEXT = 1 << 16  # bytes of one text; longer ones, such as the pickled data of a NumPy array, are left out
MAX_TEXTS = 1 << 26  # bytes of all texts that are not left out
_MAX_INTEGER = 16  # bytes; longer ones are left out
_MAX_LINE = 512  # bytes of a module's and a class's name
_MAX_ARGUMENTS = 8  # all that any of our builders looks at


class RefusedError(Exception):
    """Why a file is not read, as what follows its name in a sentence."""


class Storage(NamedTuple):
    """`count` numbers of a dtype, from the `first` on in the record called `key`. Nothing has been checked."""

    key: str
    dtype: torch.dtype
    first: Any
    count: Any


class Described(NamedTuple):
    """A tensor as a file describes it, in torch's terms, or what it is instead. Nothing has been checked."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Any
    instead: str = ""


class Pairs(list[Any]):
    """A dictionary: key, value, key, value ... Its keys can be anything, so they are not hashed."""

    __slots__ = ()

    def named(self) -> dict[str, Any]:
        """The values whose keys are texts."""
        return {key: value for key, value in zip(self[::2], self[1::2], strict=True) if type(key) is str}


_ASKS = (
    "was refused, and nothing in it was run: beside data it asks for {}. If you trust where it comes from, ask there"
    " for a .safetensors file, or for the state dict alone saved with torch.save."
)


# --- What the names in a pickle mean ---------------------------------------------------------------------------------


def _inert(*_: Any) -> object:
    """In place of all that is neither data nor a tensor: classes, what they would make, and their methods."""
    return _inert


def _pairs(*_: Any) -> Pairs:
    return Pairs()


def _first(given: Any = (), *_: Any) -> Any:
    return given


def _getattr(owner: Any = None, *_: Any) -> object:
    """How a pickle refers to a method of a class; of none but the harmless ones."""
    if owner is not _inert:
        raise RefusedError(_ASKS.format("getattr"))
    return _inert


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> Described:
    """torch's three ways of storing a tensor. More is: whether it wants a gradient, hooks, perhaps a dtype other than
    the storage's, and perhaps marks that its numbers are to be conjugated or negated.
    """
    dtype = next((value for value in more if isinstance(value, torch.dtype)), storage.dtype)
    marked = any(type(value) is Pairs and value for value in more[2:])
    return Described(storage, offset, shape, strides, dtype, "marked as conjugate or negative" if marked else "")


def _tensor_of_class(build: Any = None, _class: Any = None, arguments: Any = (), *_: Any) -> object:
    """A tensor of another class or with attributes, which are left out."""
    return _tensor(*arguments[:_MAX_ARGUMENTS]) if build is _tensor else _inert


def _instead(kind: str, shape: int) -> Callable[..., Described]:
    """What describes a tensor that cannot be a weight; `shape` says which of the arguments that is."""
    return lambda *given: Described(None, 0, given[shape], (), None, kind)


def _sparse(_layout: Any, parts: Any, *_: Any) -> Described:
    shapes = [part for part in parts[:_MAX_ARGUMENTS] if type(part) is tuple]
    return Described(None, 0, shapes[-1], (), None, "sparse")


_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _pairs,
    "yacs.config.CfgNode": _pairs,
    "mmengine.config.config.ConfigDict": _pairs,
    "lightning.fabric.utilities.data.AttributeDict": _pairs,
    "lightning_fabric.utilities.data.AttributeDict": _pairs,
    "builtins.getattr": _getattr,
    "torch.Size": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_class,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _instead("meta", 1),
    "torch._utils._rebuild_qtensor": _instead("quantized", 2),
    "torch._utils._rebuild_wrapper_subclass": _instead("of a class without data", 2),
}
# What published files hold beside tensors: what was in these is lost, and no weight with it. _codecs.encode is bytes.
_HARMLESS = [
    "_codecs.encode", "argparse.Namespace", "collections.Counter", "jsonargparse._namespace.Namespace",
    "mmengine.logging.history_buffer.HistoryBuffer", "numpy.dtype", "numpy.ndarray", "torch.device", "torch.Tensor",
    "torch.serialization._get_layout", "torch._utils._rebuild_nested_tensor",
    *(f"builtins.{name}" for name in ("bytearray", "complex", "frozenset", "set")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"{module}.{system}Path" for module in ("pathlib", "pathlib._local") for system in ("Posix", "Windows")),
]  # fmt: skip
_BUILDERS |= dict.fromkeys(_HARMLESS, _inert)
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "QInt8": torch.qint8,
    "QUInt8": torch.quint8, "QInt32": torch.qint32, "QUInt4x2": torch.quint4x2, "QUInt2x4": torch.quint2x4,
}  # fmt: skip
_STORAGE_NAMES = {"torch.storage.UntypedStorage": torch.uint8} | {
    f"{module}.{name}Storage": dtype for name, dtype in _STORAGES.items() for module in ("torch", "torch.cuda")
}


def _meaning(module: str, name: str) -> object:
    """A builder, a dtype (of a storage, too), or nothing but a name."""
    full = f"{'builtins' if module == '__builtin__' else module}.{name}"
    if full in _BUILDERS:
        return _BUILDERS[full]
    constant = vars(torch).get(name) if module == "torch" else None
    if isinstance(constant, torch.qscheme):
        return _inert
    if isinstance(dtype := _STORAGE_NAMES.get(full, constant), torch.dtype):
        return dtype
    raise RefusedError(_ASKS.format(full.removeprefix("builtins.")[:100]))


# --- The machine -----------------------------------------------------------------------------------------------------

_NUMBERS = {  # operations that a number follows
    pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BININT: "<i", pickle.BINFLOAT: ">d", pickle.BINGET: "<B",
    pickle.LONG_BINGET: "<I", pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I", pickle.PROTO: "<B", pickle.FRAME: "<Q",
}  # fmt: skip
_LENGTHS = {  # operations that a length follows, and as many bytes
    pickle.BINUNICODE: "<I", pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE8: "<Q", pickle.SHORT_BINSTRING: "<B",
    pickle.BINBYTES: "<I", pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES8: "<Q", pickle.BYTEARRAY8: "<Q",
    pickle.LONG1: "<B", pickle.LONG4: "<I",
}  # fmt: skip
_CONSTANTS = {
    pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: (), pickle.EMPTY_SET: _inert,
}  # fmt: skip
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}


class Machine:
    """Interprets what torch.save writes in protocols 2 to 5; Lib/pickletools.py documents the operations.

    Attributes:
        position: where the next operation is.
        dtypes: of every storage met, by its key.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data.cast("c")
        self.position = 0
        self.dtypes: dict[str, torch.dtype] = {}
        self._operations = self._texts = 0

    def load(self) -> Any:
        """What the pickle that starts at `position` describes.

        Raises:
            RefusedError: it asks for more than data, or for more work than any weights are.
            Exception: of many kinds, when it is damaged.
        """
        stack: list[Any] = []
        outer: list[list[Any]] = []
        memo: dict[int, Any] = {}
        while True:
            self._operations += 1
            if self._operations > MAX_OPERATIONS:
                raise RefusedError(f"takes over {MAX_OPERATIONS} operations to unpickle: save the state dict alone")
            operation = self._data[self.position]
            self.position += 1
            if operation in _NUMBERS:
                number = self._number(_NUMBERS[operation])
                match operation:
                    case pickle.BINPUT | pickle.LONG_BINPUT:
                        memo[number] = stack[-1]
                    case pickle.BINGET | pickle.LONG_BINGET:
                        stack.append(memo[number])
                    case pickle.PROTO | pickle.FRAME:
                        pass
                    case _:
                        stack.append(number)
                continue
            if operation in _LENGTHS:
                stack.append(self._counted(operation))
                continue
            if operation in _CONSTANTS:
                stack.append(_CONSTANTS[operation])
                continue
            match operation:
                case pickle.MEMOIZE:
                    memo[len(memo)] = stack[-1]
                case pickle.MARK:
                    outer.append(stack)
                    stack = []
                case pickle.TUPLE:
                    items, stack = stack, outer.pop()
                    stack.append(tuple(items))
                case pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3:
                    count = _TUPLES[operation]
                    stack[-count:] = [tuple(stack[-count:])]
                case pickle.EMPTY_LIST:
                    stack.append([])
                case pickle.EMPTY_DICT:
                    stack.append(Pairs())
                case pickle.APPEND:
                    item = stack.pop()
                    _extend(stack[-1], [item], list)
                case pickle.SETITEM:
                    value, key = stack.pop(), stack.pop()
                    _extend(stack[-1], [key, value], Pairs)
                case pickle.APPENDS | pickle.SETITEMS:
                    items, stack = stack, outer.pop()
                    _extend(stack[-1], items, list if operation == pickle.APPENDS else Pairs)
                case pickle.ADDITEMS | pickle.POP_MARK:  # members of sets are left out
                    stack = outer.pop()
                case pickle.FROZENSET:
                    stack = outer.pop()
                    stack.append(_inert)
                case pickle.POP | pickle.BUILD:  # what an object is to be set to is left out
                    stack.pop()
                case pickle.GLOBAL:
                    names = bytes(self._data[self.position : self.position + _MAX_LINE])
                    module, name, _ = names.split(b"\n", 2)
                    self.position += len(module) + len(name) + 2
                    stack.append(_meaning(module.decode(), name.decode()))
                case pickle.STACK_GLOBAL:
                    name, module = stack.pop(), stack.pop()
                    if not type(name) is type(module) is str:
                        raise ValueError("a name that is no text")
                    stack.append(_meaning(module, name))
                case pickle.REDUCE | pickle.NEWOBJ | pickle.NEWOBJ_EX:
                    if operation == pickle.NEWOBJ_EX:
                        stack.pop()
                    arguments, called = stack.pop(), stack.pop()
                    if not isinstance(called, FunctionType):  # the only functions ever on the stack are those above
                        raise ValueError("a call of what is no function")
                    stack.append(called(*arguments[:_MAX_ARGUMENTS]))
                case pickle.BINPERSID:
                    stack.append(self._storage(stack.pop()))
                case pickle.STOP:
                    return stack.pop()
                case _:
                    raise ValueError(f"operation {operation!r} of the pickle machine")

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack_from(form, self._data, self.position)
        self.position += struct.calcsize(form)
        return number

    def _counted(self, operation: bytes) -> object:
        """A text or an integer that is not too long, or nothing but a place for it; bytes are always left out."""
        length, begin = self._number(_LENGTHS[operation]), self.position
        self.position += length
        if self.position > len(self._data):
            raise ValueError("a text reaches beyond the pickle's end")
        match operation:
            case pickle.LONG1 | pickle.LONG4 if length <= _MAX_INTEGER:
                return int.from_bytes(self._data[begin : self.position], "little", signed=True)
            case pickle.BINUNICODE | pickle.SHORT_BINUNICODE | pickle.BINUNICODE8 | pickle.SHORT_BINSTRING:
                if length <= MAX_TEXT:
                    self._texts += length
                    if self._texts > MAX_TEXTS:
                        raise RefusedError(f"holds over {MAX_TEXTS} bytes of text: save the state dict alone")
                    return str(self._data[begin : self.position], "utf-8", "replace")
        return _inert

    def _storage(self, reference: object) -> Storage:
        match reference:
            case ("storage", torch.dtype() as dtype, str() as key, _, count) | (
                "storage", torch.dtype() as dtype, str() as key, _, count, None
            ):  # fmt: skip
                view = (None, 0, count)
            case ("storage", torch.dtype() as dtype, str() as key, _, _, tuple() as view):
                pass
            case _:
                raise ValueError("a reference to something other than a storage")
        self.dtypes.setdefault(key, dtype)
        _, first, count = view
        return Storage(key, dtype, first, count)


def _extend(target: object, items: list[Any], kind: type[list[Any]]) -> None:
    if type(target) is kind:
        target.extend(items)
    elif target is not _inert:
        raise ValueError("items for what is no container")
