"""Weight files that attack, made from a seed: `make(seed)` gives what is attacked and the file's bytes.

Each kind is a function of a random generator. They know the formats: pickles are put together from operations, archives
and headers from fields, each of which can lie, and whole files of all three formats are damaged. Whatever is made to be
run would leave a file called MARKER in the current folder.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import pickletools
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch
from models.loading import small, vanilla
from models.released import theirs
from torch import Tensor

MARKER = "hostile_file_was_run"
KINDS: list[Callable[[random.Random], bytes]] = []


def make(seed: int) -> tuple[str, bytes]:
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    return kind.__name__, kind(rng)


def kind(function: Callable[[random.Random], bytes]) -> Callable[[random.Random], bytes]:
    KINDS.append(function)
    return function


# --- Pickles out of operations ---------------------------------------------------------------------------------------


class Raw(bytes):
    """Operations that leave one value on the stack."""


def dump(value: Any) -> bytes:
    """The operations for a value."""
    match value:
        case Raw():
            return value
        case None | bool():
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return (
                b"\x8a" + bytes([len(data)]) + data
                if len(data) < 256
                else b"\x8b" + struct.pack("<I", len(data)) + data
            )
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            data = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(data)) + data
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(dump, value)) + b"t"
        case list():
            return b"](" + b"".join(map(dump, value)) + b"e"
        case dict():
            return b"}(" + b"".join(dump(key) + dump(item) for key, item in value.items()) + b"u"
    raise TypeError(type(value))


def name(path: str) -> Raw:
    module, _, attribute = path.rpartition(".")
    return Raw(b"c" + module.encode() + b"\n" + attribute.encode() + b"\n")


def call(path: str | Raw, *arguments: Any) -> Raw:
    function = path if isinstance(path, Raw) else name(path)
    return Raw(function + dump(arguments) + b"R")


def built(value: Any, state: Any) -> Raw:
    return Raw(dump(value) + dump(state) + b"b")


def put(value: Any, number: int) -> Raw:
    return Raw(dump(value) + b"r" + struct.pack("<I", number))


def get(number: int) -> Raw:
    return Raw(b"j" + struct.pack("<I", number))


def storage(key: Any = "0", count: Any = 16, kind: str = "torch.FloatStorage", *more: Any) -> Raw:
    return Raw(dump(("storage", name(kind), key, "cpu", count, *more)) + b"Q")


def tensor(place: Raw | None = None, offset: Any = 0, shape: Any = (16,), strides: Any = (1,), *more: Any) -> Raw:
    more = more or (False, call("collections.OrderedDict"))
    version = 3 if len(more) > 2 else 2
    return call(f"torch._utils._rebuild_tensor_v{version}", place or storage(), offset, shape, strides, *more)


def torch_file(rng: random.Random, top: Any, records: dict[str, bytes] | None = None) -> bytes:
    """What torch.save would write, in one of its two formats, if it wrote these operations."""
    records = {"0": bytes(64)} if records is None else records
    operations = b"\x80" + bytes([rng.choice((2, 2, 3, 4, 5))]) + dump(top) + b"."
    if rng.random() < 0.3:
        return legacy(operations, records)
    return archive([("a/data.pkl", operations), *((f"a/data/{key}", data) for key, data in records.items())])


def legacy(operations: bytes, records: dict[str, bytes]) -> bytes:
    beginning = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    head = b"".join(pickle.dumps(value, protocol=2) for value in beginning)
    data = b"".join(struct.pack("<q", len(data) // 4) + data for data in records.values())
    return head + operations + pickle.dumps(list(records), protocol=2) + data


Field = tuple[str, int]  # of an entry in the table of contents, or of the table's own end


def archive(files: Sequence[tuple[str, bytes]], lies: Iterable[tuple[int, str, int]] = (), wide: bool = True) -> bytes:
    """A zip archive. A lie is the number of an entry (-1: the end of the table), a field and its value."""
    body, table = bytearray(), bytearray()
    told: dict[int, dict[str, int]] = {}
    for number, field, value in lies:
        told.setdefault(number, {})[field] = value
    for number, (path, data) in enumerate(files):
        fields = {"flags": 0, "method": 0, "crc": zlib.crc32(data), "packed": len(data), "size": len(data),
                  "header": len(body), "name": len(path), "extra": 0, "comment": 0} | told.get(number, {})  # fmt: skip
        short = {key: value & (0xFFFF if key in ("flags", "method", "name", "extra", "comment") else 0xFFFFFFFF)
                 for key, value in fields.items()}  # fmt: skip
        local = ("flags", "method", "crc", "packed", "size", "name", "extra")
        table += struct.pack(
            "<4s4xHH4xIIIHHH8xI", b"PK\1\2", *(short[key] for key in ("flags", "method", "crc", "packed", "size")),
            short["name"], short["extra"], short["comment"], short["header"],
        ) + path.encode()  # fmt: skip
        body += struct.pack("<4s2xHH4xIIIHH", b"PK\3\4", *(short[key] for key in local)) + path.encode() + data
    end = {"count": len(files), "bytes": len(table), "table": len(body), "record": len(body) + len(table)} | told.get(
        -1, {}
    )
    end = {key: value & 0xFFFFFFFFFFFFFFFF for key, value in end.items()}
    if wide:
        record = struct.pack("<4sQ12xQQQQ", b"PK\6\6", 44, end["count"], end["count"], end["bytes"], end["table"])
        table += record + struct.pack("<4s4xQI", b"PK\6\7", end["record"], 1)
    count = end["count"] & 0xFFFF
    last = struct.pack("<4s4xHHIIH", b"PK\5\6", count, count, end["bytes"] & 0xFFFFFFFF, end["table"] & 0xFFFFFFFF, 0)
    return bytes(body + table + last)


def number(rng: random.Random) -> Any:
    """What a count, an offset or a stride may lie about."""
    small = [0, 1, 2, 15, 16, 17, 64, 255, -1, -16, rng.randrange(20), rng.randrange(1 << 30)]
    large = [1 << 16, 1 << 20, 1 << 31, (1 << 32) + 4, 1 << 40, 1 << 50, (1 << 62) + 4, 1 << 63, 1 << 64, 1 << 2000]
    return rng.choice([*small, *large, -(1 << 63), True, None, 1.0, "4", (), [4]])


def value(rng: random.Random, depth: int = 3) -> Any:
    """Some value that a file may hold beside its weights."""
    leaves = [None, True, 3, -1, 1 << 70, 0.5, float("nan"), "text", "\ud800", "é" * 9, b"bytes", Raw(b")"),
              Raw(b"\x8f"), tensor(), storage(), name("torch.float32"), call("torch.device", "cuda:7"),
              call("torch.Size", (1, 2)),
              call("pathlib.PosixPath", "/etc", "passwd"), call("_codecs.encode", "x", "latin1")]  # fmt: skip
    if not depth or rng.random() < 0.4:
        return rng.choice(leaves)
    items = [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return rng.choice(
        [
            items,
            tuple(items),
            dict(zip("abcd", items, strict=False)),
            call("collections.OrderedDict"),
            built(items, items),
        ]
    )


PLACES = ("config", "meta", "hyper_parameters", "model", "state_dict", "epoch", "anything")


def somewhere(rng: random.Random, hostile: Any) -> Any:
    """A dictionary with something hostile in it, beside or in the weights."""
    top: dict[str, Any] = {"model": {"patch_embed.0.weight": tensor(), "x": 1}, "epoch": 3}
    place = rng.choice(PLACES)
    return top | {
        place: rng.choice([hostile, {"deeper": hostile}, [hostile], {"model": {"stem.conv.weight": hostile}}])
    }


CODE = [
    lambda: call("os.system", f"touch {MARKER}"),
    lambda: call("posix.system", f"touch {MARKER}"),
    lambda: call("subprocess.Popen", ["touch", MARKER]),
    lambda: call("builtins.eval", f"open('{MARKER}', 'w')"),
    lambda: call("__builtin__.exec", f"open('{MARKER}', 'w')"),
    lambda: call("builtins.open", MARKER, "w"),
    lambda: call("io.open", MARKER, "w"),
    lambda: call("pathlib.Path.touch", call("pathlib.PosixPath", MARKER)),
    lambda: call(call("builtins.getattr", call("builtins.__import__", "os"), "system"), f"touch {MARKER}"),
    lambda: call(call("builtins.getattr", name("numpy.ndarray"), "tofile"), call("numpy.ndarray"), MARKER),
    lambda: call(call("builtins.getattr", name("torch.Tensor"), "__reduce__")),
    lambda: call(call("builtins.getattr", name("argparse.Namespace"), "__init__.__globals__"), MARKER),
    lambda: call("torch._tensor._rebuild_from_type_v2", name("os.system"), name("torch.Size"), (MARKER,), ()),
    lambda: call("torch._tensor._rebuild_from_type_v2", name("torch.Size"), name("os.system"), ((),), {"a": 1}),
    lambda: call("torch.storage._load_from_bytes", pickle.dumps(print)),
    lambda: call("torch.hub.load", "evil/evil", "evil"),
    lambda: call("torch.serialization.load", MARKER),
    lambda: call("numpy.load", MARKER),
    lambda: call("functools.partial", name("os.system"), f"touch {MARKER}"),
    lambda: call("operator.attrgetter", "system"),
    lambda: call("numpy.core.multiarray._reconstruct", name("os.system"), (f"touch {MARKER}",), b"b"),
    lambda: Raw(dump("os") + dump("system") + b"\x93" + dump((f"touch {MARKER}",)) + b"R"),
    lambda: Raw(name("os.system") + dump((f"touch {MARKER}",)) + b"\x81"),
    lambda: Raw(name("os.system") + dump((f"touch {MARKER}",)) + dump({}) + b"\x92"),
    lambda: Raw(b"(S'touch " + MARKER.encode() + b"'\nios\nsystem\n"),
    lambda: Raw(b"(cos\nsystem\nS'touch " + MARKER.encode() + b"'\no"),
    lambda: Raw(b"\x82\x01" + dump((MARKER,)) + b"R"),
    lambda: Raw(b"Pos.system\n"),
    lambda: Raw(dump(("module", name("os.system"), "", "")) + b"Q"),
    lambda: Raw(dump(("storage", name("os.system"), "0", "cpu", 1)) + b"Q"),
    lambda: built(name("torch.Tensor"), {"__reduce__": name("os.system")}),
    lambda: built(call("collections.OrderedDict"), {"__class__": name("os.system"), "items": 3}),
    lambda: built(call("argparse.Namespace"), (None, {"__class__": name("builtins.dict")})),
]  # fmt: skip


@kind
def code(rng: random.Random) -> bytes:
    return torch_file(rng, somewhere(rng, rng.choice(CODE)()))


@kind
def overwritten_tensors(rng: random.Random) -> bytes:
    names = (
        "to numel element_size untyped_storage type shape dtype device layout is_quantized __class__ __dict__ data grad"
    )
    state = {key: rng.choice([3, None, "x", name("torch.float32"), tensor()]) for key in rng.sample(names.split(), 3)}
    no_hooks = call("collections.OrderedDict")
    kinds = [
        lambda: call("torch._tensor._rebuild_from_type_v2", name("torch._utils._rebuild_tensor_v2"),
                     name("torch.Tensor"), (storage(), 0, (16,), (1,), False, no_hooks), state),
        lambda: call("torch._utils._rebuild_parameter_with_state", tensor(), True, no_hooks, state),
        lambda: call("torch._utils._rebuild_parameter", tensor(), True, state),
        lambda: built(tensor(), state),
        lambda: built(tensor(), (storage(), number(rng), (number(rng),), (1,))),
        lambda: built(call("torch.nn.parameter.Parameter", tensor()), (state, 3, number(rng), value(rng))),
        lambda: built(name("torch._utils._rebuild_tensor_v2"), state),
        lambda: built(storage(), state),
        lambda: tensor(storage(), 0, (16,), (1,), True, state),
        lambda: tensor(storage(), 0, (16,), (1,), False, no_hooks, {"conj": True, "neg": 1}),
        lambda: Raw(tensor() + dump(state) + b"u"),
        lambda: Raw(tensor() + b"(" + dump("x") + dump(3) + b"u"),
        lambda: Raw(tensor() + dump(3) + b"a"),
    ]  # fmt: skip
    return torch_file(rng, somewhere(rng, rng.choice(kinds)()))


@kind
def lying_tensors(rng: random.Random) -> bytes:
    """Storages, shapes, strides and offsets of which one or two are not true, under the name of a weight."""
    storages = ["Float", "Half", "Byte", "Long", "Double", "ComplexFloat", "QInt8", "QUInt4x2", "Bool", "Imaginary"]
    place: list[Any] = ["0", 16, "torch.FloatStorage"]
    dims = rng.choice([0, 1, 1, 2, 4, 70])
    parts: list[Any] = [0, (2,) * min(dims, 4) if dims < 70 else (1,) * 70, (1,) * dims]
    for _ in range(rng.choice((1, 1, 2, 3))):
        match rng.randrange(8):
            case 0:
                place[0] = rng.choice(["0", "1", "../data.pkl", "", 0, None, "0" * 70000, ("0",)])
            case 1:
                place[1] = number(rng)
            case 2:
                place[2] = rng.choice(
                    [f"torch.{rng.choice(storages)}Storage", "torch.storage.UntypedStorage", "torch.float32"]
                )
            case 3:
                place.append(rng.choice([None, (), ("v", number(rng), number(rng)), ("v", 1, 2, 3), "v"]))
            case 4:
                parts[0] = number(rng)
            case 5:
                parts[1] = rng.choice(
                    [(number(rng),), (number(rng), number(rng)), number(rng), [2], (1 << 40,) * 4, (0, 1 << 62)]
                )
            case 6:
                parts[2] = rng.choice([(number(rng),), (number(rng), number(rng)), number(rng), (0,) * dims])
            case 7:
                dtypes = [
                    "float4_e2m1fn_x2",
                    "float8_e5m2",
                    "float64",
                    "quint8",
                    "bits8",
                    "uint1",
                    "complex128",
                    "bool",
                    "int4",
                ]
                parts += [False, call("collections.OrderedDict"), name(f"torch.{rng.choice(dtypes)}")]
    hostile = tensor(storage(*place), *parts[:3], *parts[3:6])
    weights = {rng.choice(["stem.conv.weight", "patch_embed.0.weight", "x"]): hostile}
    return torch_file(rng, rng.choice([weights, {"model": weights}, weights | {"stem.norm.weight": tensor()}]))


@kind
def unusual_tensors(rng: random.Random) -> bytes:
    """Tensors that torch can save and a model cannot hold, whole or with an argument replaced."""
    if rng.random() < 0.5:
        functions = [
            "sparse_tensor",
            "qtensor",
            "meta_tensor_no_storage",
            "nested_tensor",
            "wrapper_subclass",
            "tensor",
            "parameter",
            "xla_tensor",
            "device_tensor_from_cpu_tensor",
            "device_tensor_from_numpy",
        ]
        arguments = [rng.choice([tensor(), storage(), number(rng), (2, 3), value(rng), name("torch.float32"),
                                 call("torch.serialization._get_layout", "torch.sparse_coo"),
                                 (tensor(), tensor(), call("torch.Size", (number(rng),)), True)])
                     for _ in range(rng.randrange(9))]  # fmt: skip
        return torch_file(rng, somewhere(rng, call(f"torch._utils._rebuild_{rng.choice(functions)}", *arguments)))
    plain = torch.zeros(rng.choice([(4,), (2, 3), (0, 5), ()]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: list[Callable[[], Any]] = [
            lambda: torch.eye(4).to_sparse(), lambda: torch.eye(4).to_sparse_csr(), lambda: plain.to(torch.complex64),
            lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), lambda: plain.to("meta"),
            lambda: torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8),
            lambda: plain.to(torch.float8_e4m3fn), lambda: torch.ones(4).byte().view(torch.float4_e2m1fn_x2),
            lambda: torch.zeros(1).expand(rng.choice([3, 1 << 20, 1 << 30, 1 << 60])), lambda: plain.to(torch.uint16),
            lambda: torch.ones(3, dtype=torch.complex64).conj(), lambda: torch.nested.nested_tensor([torch.ones(2)]),
            lambda: torch.zeros(9).as_strided((3, 3), (0, 1)), lambda: torch.nn.Parameter(plain), lambda: np.zeros(4),
            lambda: torch.zeros(8)[3:5], lambda: torch.zeros(4, dtype=torch.bool), lambda: torch.zeros(4).bfloat16(),
        ]  # fmt: skip
        weights = {rng.choice(["stem.conv.weight", "x", "norm.bias"]): rng.choice(made)()}
        content = io.BytesIO()
        torch.save(
            rng.choice([weights, {"model": weights}]), content, _use_new_zipfile_serialization=rng.random() < 0.7
        )
    return content.getvalue()


@kind
def bombs(rng: random.Random) -> bytes:
    """Few bytes that describe much: containers in containers many times over, without end, or as keys."""
    many, deep = rng.choice((2, 10, 30)), rng.choice((20, 60, 400))
    forms = [
        lambda item: (item,) * many,
        lambda item: [item] * many,
        lambda item: dict.fromkeys(range(many), item),
    ]
    match rng.randrange(9):
        case 0:
            form = rng.choice(forms)
            hostile: Any = put(rng.choice([(), "x", tensor()]), 1000)
            for level in range(deep):
                hostile = Raw(hostile + b"0" + put(form(get(1000 + level)), 1001 + level))
        case 1:  # tuples, lists or dictionaries each in the next
            inner, wrap = rng.choice([(b")", b"\x85"), (b"", None), (b")", b"R")])
            depth = rng.choice((1000, 50_000, 200_000))
            hostile = Raw(inner + wrap * depth) if wrap else Raw(b"](" * depth + b"e" * depth)
            hostile = rng.choice(
                [hostile, {hostile: 1}, call("builtins.set", [hostile]), call("builtins.frozenset", hostile)]
            )
        case 2:  # an object in itself
            hostile = Raw(
                put(rng.choice([Raw(b"]"), Raw(b"}")]), 7) + b"(" + dump("k") * rng.choice((0, 1)) + get(7) + b"u"
            )
            hostile = rng.choice([hostile, Raw(put(Raw(b"]"), 7) + get(7) * 3 + b"aaa")])
        case 3:  # a text that grows as it is escaped
            hostile = put("\\" * 100, 9)
            for _ in range(rng.choice((10, 24, 40))):
                hostile = call("_codecs.encode", call("_codecs.encode", hostile, "unicode_escape"), "latin1")
        case 4:  # keys that all fall together
            step = rng.choice([(1 << 61) - 1, 1 << 32, 1 << 61])
            hostile = {number * step: None for number in range(rng.choice((1000, 60_000)))}
        case 5:
            hostile = rng.choice(
                [1 << (8 * rng.choice((200, 70_000, 500_000))), "x" * 3_000_000, "\U0001f600" * 300_000]
            )
        case 6:  # places in the memo
            hostile = Raw(
                b"".join(put(None, rng.choice((0xFFFFFFFF, 0x7FFFFFFF, i << 12))) + b"0" for i in range(999)) + b"N"
            )
        case 7:  # one wide tuple as the arguments of many calls
            hostile = Raw(put((0,) * 50_000, 5) + b"0](" + (rng.choice([
                name("collections.OrderedDict"), name("torch.Size"), name("torch._utils._rebuild_tensor_v2"), b"",
            ]) + get(5) + b"R") * 20_000 + b"e")  # fmt: skip
        case _:  # dictionaries of which each is in many places
            hostile = put({f"t{i}": tensor(storage(), 0, (1,)) for i in range(40)}, 100)
            for level in range(4):
                hostile = Raw(
                    hostile + b"0" + put({f"{'n' * 200}{i}": get(100 + level) for i in range(60)}, 101 + level)
                )
    return torch_file(rng, rng.choice([somewhere(rng, hostile), hostile, {"model": hostile}]))


@kind
def masses(rng: random.Random) -> bytes:
    """A great number of operations, tensors, views or records."""
    count = rng.choice((1000, 30_000, 300_000, 3_000_000)) if rng.random() < 0.1 else rng.choice((100, 3000))
    match rng.randrange(6):
        case 0:
            operation = rng.choice(
                [
                    b"N",
                    b"(",
                    b"]",
                    b"}",
                    b"\x8f",
                    b")",
                    b"N\x94",
                    b"K\1",
                    b"](e",
                    b"}(u",
                    b"ccollections\nOrderedDict\n)R",
                ]
            )
            return torch_file(rng, Raw(operation * count))
        case 1:
            count = min(count, 100_000)
            return torch_file(
                rng,
                Raw(b"}(" + put(tensor(), 1) + b"0" + b"".join(dump(f"t{i}") + get(1) for i in range(count)) + b"u"),
            )
        case 2:  # a large network out of one small storage
            shared, size = bytes(1 << rng.choice((10, 20, 22))), 0
            size = len(shared) // 4
            parts = {
                f"layers.{i % 4}.blocks.{i}.op.in_proj.weight": tensor(storage("0", size), 0, (size,))
                for i in range(min(count, 3000))
            }
            return torch_file(
                rng,
                {"patch_embed.0.weight": tensor(storage("0", size), 0, (16, 3, 1, 1), (3, 1, 1, 1)), **parts},
                {"0": shared},
            )
        case 3:  # views that reach over all of a storage that lies askew
            shared = bytes(1 << 20)
            view = tensor(storage("0", 1 << 18), 0, (2,), ((1 << 18) - 1,))
            parts = {f"t{i}": view for i in range(min(count, 3000))}
            return legacy(b"\x80\x02" + dump(parts) + b"." + b"", {"0": shared})
        case 4:
            files = [("a/data.pkl", b"\x80\x02}."), *((f"a/data/{i}", b"") for i in range(min(count, 60_000)))]
            return archive(files)
        case _:
            header = {
                f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(min(count, 300_000))
            }
            return safetensors_file(json.dumps(header).encode(), b"")


@kind
def soup(rng: random.Random) -> bytes:
    """Operations in random order, most of them with what they need on the stack."""
    codes = [operation.code.encode("latin1") for operation in pickletools.opcodes]
    parts: list[bytes] = []
    for _ in range(rng.choice((5, 40, 400))):
        pick = rng.random()
        if pick < 0.5:
            parts.append(dump(value(rng, 2)))
        elif pick < 0.8:
            few = b"012(teausbRQ]}" + b"\x85\x86\x87\x81\x92\x90\x91\x93\x94"
            parts.append(rng.choice([*(bytes([code]) for code in few), b"h\0", b"q\0"]))
        else:
            parts.append(rng.choice(codes) + rng.randbytes(rng.choice((0, 1, 2, 4, 8))))
    return torch_file(rng, rng.choice([Raw(b"".join(parts)), somewhere(rng, Raw(b"(" + b"".join(parts) + b"t"))]))


# --- Archives --------------------------------------------------------------------------------------------------------


@kind
def lying_archives(rng: random.Random) -> bytes:
    pickled = b"\x80\x02" + dump({"model": {"stem.conv.weight": tensor()}}) + b"."
    files = [
        ("a/data.pkl", pickled),
        ("a/byteorder", b"little"),
        ("a/data/0", bytes(64)),
        ("a/data/1", bytes(640)),
        ("a/version", b"3"),
    ]
    lies = []
    for _ in range(rng.randrange(1, 4)):
        entry = rng.randrange(-1, len(files))
        fields = (
            ["count", "bytes", "table", "record"]
            if entry < 0
            else ["flags", "method", "crc", "packed", "size", "header", "name", "extra", "comment"]
        )
        lies.append(
            (
                entry,
                rng.choice(fields),
                rng.choice(
                    [0, 1, 8, 30, 46, 64, 100, 300, 0xFFFF, 1 << 20, 1 << 31, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1]
                ),
            )
        )
    if rng.random() < 0.3:
        files.append(rng.choice(files))
    if rng.random() < 0.1:
        files += [
            (rng.choice(["b/data.pkl", "data.pkl", "a/x.npy", "a/constants.pkl", "\0", "../data.pkl", "é"]), pickled)
        ]
    rng.shuffle(files) if rng.random() < 0.2 else None
    content = archive(files, lies if rng.random() < 0.9 else (), wide=rng.random() < 0.6)
    return rng.choice(
        [content] * 6 + [content[:-22] + content[-22:] * 2, b"PK\3\4" + content, content + bytes(rng.randrange(70_000))]
    )


@kind
def overlapping_archives(rng: random.Random) -> bytes:
    """Records that share their bytes, as in the famous bombs."""
    count = rng.choice((2, 50, 3000, 60_000) if rng.random() < 0.1 else (2, 50, 500))
    payload = bytes(rng.choice((64, 1 << 16, 1 << 22)))
    files = [
        (
            "a/data.pkl",
            b"\x80\x02" + dump({f"t{i}": tensor(storage(str(i), 16)) for i in range(min(count, 1000))}) + b".",
        ),
        ("a/data/0", payload),
    ]
    shared = 30 + len("a/data.pkl") + len(files[0][1])
    files += [(f"a/data/{i}", b"") for i in range(1, count)]
    lies = [
        (i, key, v)
        for i in range(2, count + 1)
        for key, v in (("header", shared), ("packed", len(payload)), ("size", len(payload)))
    ]
    return archive(files, lies)


@kind
def compressed_archives(rng: random.Random) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])) as file:
        file.writestr("a/data.pkl", b"\x80\x02" + dump({"x": tensor()}) + b".")
        file.writestr("a/data/0", bytes(rng.choice((64, 1 << 24))))
    return content.getvalue()


# --- safetensors -----------------------------------------------------------------------------------------------------


def safetensors_file(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@kind
def lying_headers(rng: random.Random) -> bytes:
    entry: dict[str, Any] = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    odd = [
        0,
        -1,
        16,
        17,
        64,
        1 << 40,
        1 << 64,
        10**400,
        1.0,
        1e308,
        float("nan"),
        None,
        "x",
        [],
        {},
        [16, 1],
        [[16]],
        [0, 1 << 62],
        [1 << 32] * 3,
        [1] * 99,
    ]
    for _ in range(rng.randrange(3)):
        match rng.randrange(4):
            case 0:
                entry["dtype"] = rng.choice(["F4", "F8_E4M3", "F6_E2M3", "C64", "BOOL", "F64", "X", "F32\x1b[2J", *odd])
            case 1:
                entry["shape"] = rng.choice([*odd, [rng.choice(odd)], [4, rng.choice(odd)]])
            case 2:
                entry["data_offsets"] = rng.choice([*odd, [rng.choice(odd), 64], [0, rng.choice(odd)]])
            case 3:
                entry[rng.choice(["extra", "dtype2"])] = rng.choice(odd)
    names = [
        "stem.conv.weight",
        "patch_embed.0.weight",
        "",
        "a\nb",
        "\x1b[31mred",
        "n" * 100_000,
        "é",
        "\ud800",
        "__metadata__",
    ]
    header: Any = {rng.choice(names): entry}
    if rng.random() < 0.3:
        header["__metadata__"] = rng.choice(
            [{"vmamba": "[" * 50_000}, {"a": 1}, {"a": None}, [], "x", {"vmamba": "x"}, {"format": "pt"}]
        )
    text = json.dumps(header).encode()
    deep = rng.choice((100, 3000, 1_000_000))
    text = rng.choice(
        [text] * 8
        + [
            text[:-1] + b"," + text[1:],
            b'{"a":' + b"[" * deep,
            b'{"a":' + b'{"a":' * deep,
            text[:-3],
            b"{" + b" " * deep + text[1:],
            b'{"a":' + b"9" * deep + b"}",
            b"\xff" + text,
        ]
    )
    length = rng.choice([None] * 8 + [0, 1, len(text) - 1, len(text) + 64, 1 << 40, (1 << 64) - 1])
    data = bytes(rng.choice((64, 64, 64, 0, 63, 65, 1 << 16)))
    return safetensors_file(b"{" + text[1:] if text[:1] != b"\xff" else text, data, length)


@kind
def impossible_models(rng: random.Random) -> bytes:
    """Whole weights whose metadata name what no model can be built with."""
    odd: list[Any] = [
        float("inf"),
        float("-inf"),
        float("nan"),
        -1,
        0,
        7,
        2.5,
        -0.5,
        1e308,
        1 << 40,
        10**50,
        "x",
        "",
        None,
    ]
    odd += [True, [], {}, [1, 2], [-1] * 4, [0] * 4, [1 << 30] * 4, [10**6] * 4, [1e9] * 3, [[1]], ["x"] * 4, {"a": 1}]
    names = [
        "ssm_ratio",
        "mlp_ratio",
        "drop_path_rate",
        "drop_rate",
        "depths",
        "dims",
        "d_state",
        "dt_rank",
        "img_size",
        "num_classes",
        "in_chans",
        "stem",
        "downsample",
        "gated",
        "conv_bias",
        "patch_size",
        "norm_layer",
        "pretrained",
        "features_only",
        "checkpoint",
        "device",
        "ape",
    ]
    kwargs = {rng.choice(names): rng.choice(odd) for _ in range(rng.choice((0, 1, 1, 2, 3)))}
    about: dict[str, Any] = {
        "format": 1,
        "variant": "vmamba_femto_s2",
        "num_classes": 10,
        "in_chans": 3,
        "model_kwargs": kwargs,
    }
    for _ in range(rng.choice((0, 0, 1, 2))):
        about[
            rng.choice(
                [
                    "variant",
                    "img_size",
                    "mean",
                    "std",
                    "crop_pct",
                    "interpolation",
                    "num_classes",
                    "in_chans",
                    "model_kwargs",
                    "format",
                    "class_names",
                    "task",
                ]
            )
        ] = rng.choice([*odd, "resnet18", "vit_base_patch16_224", "upernet_vmamba_tiny_s1l8", "vmamba_base_s1l20"])
    tensors = dict(weights("small"))
    for _ in range(rng.choice((0, 0, 1))):
        key = rng.choice(list(tensors))
        tensors[key] = rng.choice(
            [
                torch.zeros(0),
                torch.zeros(3),
                tensors[key].half(),
                torch.zeros(1, 1, 1, 1, 1),
                tensors[key].to(torch.complex64),
            ]
        )
    return safetensors.torch.save(tensors, {"format": "pt", "vmamba": json.dumps(about)})


# --- Whole files, damaged --------------------------------------------------------------------------------------------


@functools.cache
def weights(which: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return (small() if which == "small" else vanilla()).state_dict()


@functools.cache
def whole(number: int) -> bytes:
    state = weights("vanilla")
    content = io.BytesIO()
    contents: Any = {
        "model": theirs(state),
        "epoch": 3,
        "config": {"a": [1, 2.5, "x"]},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }
    match number:
        case 0 | 1:
            torch.save(contents, content, _use_new_zipfile_serialization=number == 0)
        case 2:
            torch.save({key: torch.nn.Parameter(item) for key, item in state.items()}, content, pickle_protocol=4)
        case 3:
            torch.save({key: item.to(torch.float8_e5m2) for key, item in state.items()}, content)
        case _:
            return safetensors.torch.save(state, {"format": "pt", "vmamba": json.dumps({"format": 1, "variant": "x"})})
    return content.getvalue()


@kind
def damaged(rng: random.Random) -> bytes:
    content = bytearray(whole(rng.randrange(5)))
    for _ in range(rng.choice((1, 1, 2, 8))):
        near = rng.choice([rng.randrange(1000), rng.randrange(len(content)), len(content) - rng.randrange(1, 6000)])
        near = min(max(near, 0), len(content) - 1)
        match rng.randrange(7):
            case 0:
                content[near] = rng.randrange(256)
            case 1:
                content[near] ^= 1 << rng.randrange(8)
            case 2:
                del content[near : near + rng.randrange(1, 100)]
            case 3:
                content[near:near] = rng.randbytes(rng.randrange(1, 20))
            case 4:
                content[near : near + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\0\0\0\x80", b"\xff\xff\xff\x7f"])
            case 5:
                start = rng.randrange(len(content))
                content[near:near] = content[start : start + rng.randrange(1, 300)]
            case _:
                content = content[:near] if rng.random() < 0.3 else content
        content = content or bytearray(b"PK\3\4")
    return bytes(content)


@kind
def other_files(rng: random.Random) -> bytes:
    magic, end = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2), b"PK\5\6" + bytes(18)
    beginnings = [b"", b"PK\3\4", b"\x80\x02", magic, b"\x89HDF", b"{", bytes(8) + b"{", b"\xff" * 8 + b"{", end]
    beginnings += [b"\2" + bytes(7) + b"{}", b"PK\3\4" + b"PK\5\6" * 4000, b"PK\3\4" + b"PK\6\7" + bytes(16) + end]
    return rng.choice(beginnings) + rng.choice(
        [b"", rng.randbytes(rng.randrange(3000)), bytes(rng.randrange(3000)), b"[" * 9999]
    )
