"""The shared library: where it is, what it needs to be told, and how its functions are called.

Each of its compute functions is `int32_t name(Structure*)`, 0 or 1 where memory ran out, beside an
`int64_t name_size()` of that structure. To call one from Python takes a mirror of the structure and a line:

    class _Scan(ctypes.Structure):
        _fields_ = fields(sizes="batch …", pointers="u …", flags="bfloat16 …")

    _call_scan = compute_function("vmamba_scan", _Scan)
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY_VARIABLE = "VMAMBA_NATIVE_LIBRARY"
KERNELS_VARIABLE = "VMAMBA_NATIVE_KERNELS"

_INTERFACE = 13


def _find() -> Path | None:
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named)
    # An editable install keeps the library with the installed packages and the sources elsewhere: the path has both.
    places = (Path(place) / "_native.so" for place in sys.modules["vmamba.ops.backends"].__path__)
    return next((place for place in places if place.exists()), None)


def _openmp_parallel() -> int | None:
    """Address of GOMP_parallel in torch's OpenMP runtime; importing torch makes its symbols global."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    path = _find()
    if path is None:
        return None, (
            "the CPU kernel was not built; it needs a C++ compiler (GCC 12 or Clang 15, or newer) when the package is"
            " installed: install one, then this package again, from where it came, with `pip install --no-deps"
            " --force-reinstall --no-cache-dir --verbose`, which shows what the compiler says"
        )
    try:
        library = ctypes.CDLL(str(path))
        interface = library.vmamba_interface()
    except (OSError, AttributeError) as error:
        return None, f"the CPU kernel {path} could not be loaded: {error}"
    if interface != _INTERFACE:
        return None, f"the CPU kernel {path} belongs to another version of this package; reinstall it"
    library.vmamba_kernels.restype = ctypes.c_char_p
    library.vmamba_use_openmp.argtypes = [ctypes.c_void_p]
    library.vmamba_choose.argtypes = [ctypes.c_char_p]
    library.vmamba_initialise()
    library.vmamba_use_openmp(_openmp_parallel())
    kernels = os.environ.get(KERNELS_VARIABLE, "")
    if not library.vmamba_choose(kernels.encode()):
        return None, f"{KERNELS_VARIABLE} is {kernels!r}; this processor and this build have no such kernels"
    return library, None


_LIBRARY, _WHY_NOT = _load()
_kernels: str | None = None if _LIBRARY is None else _LIBRARY.vmamba_kernels().decode()
_is_warned = False


def fields(sizes: str = "", pointers: str = "", floats: str = "", flags: str = "") -> list[tuple[str, Any]]:
    """The `_fields_` of a structure whose members, in this order, are int64_t, pointers, float and int32_t."""
    kinds = ((ctypes.c_int64, sizes), (ctypes.c_void_p, pointers), (ctypes.c_float, floats), (ctypes.c_int32, flags))
    return [(name, kind) for kind, names in kinds for name in names.split()]


def compute_function(name: str, structure: type[ctypes.Structure]) -> Callable[[ctypes.Structure], None]:
    """The library's function `name`; calling it raises RuntimeError where memory runs out or the library is missing."""
    if _LIBRARY is None:

        def missing(_: ctypes.Structure) -> None:
            raise RuntimeError(_WHY_NOT)

        return missing
    size = getattr(_LIBRARY, f"{name}_size")
    size.restype = ctypes.c_int64
    assert size() == ctypes.sizeof(structure), f"{structure.__name__} is not the structure that {name} takes"
    function = getattr(_LIBRARY, name)
    function.argtypes = [ctypes.POINTER(structure)]

    def call(arguments: ctypes.Structure) -> None:
        if function(ctypes.byref(arguments)):
            raise RuntimeError(f"{name}: out of memory")

    return call


def pointer(value: Tensor) -> int:
    """Where the numbers of a tensor lie.

    Raises:
        RuntimeError: as of `require_memory`.
    """
    require_memory(value)
    return value.data_ptr()


def require_memory(*values: Tensor | None) -> None:
    """Raise where the memory of a tensor has been freed, which torch's own layers do not always notice.

    Raises:
        RuntimeError: it has been.
    """
    for value in values:
        # What a tensor says itself is an offset where it is part of a larger one.
        if value is not None and not value.untyped_storage().data_ptr() and value.numel():
            raise RuntimeError(
                f"a tensor of shape {tuple(value.shape)} has no memory: it has been freed, as FSDP frees parameters not"
                " in use; call the module that FSDP wraps, not its parts, or gather the parameters first"
            )


def reason_unavailable() -> str | None:
    """Why the library cannot be called, or None when it can."""
    return _WHY_NOT


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None when it can."""
    return _WHY_NOT if device.type == "cpu" else "it runs on the CPU only"


def kernels() -> str | None:
    """The instruction set in use; None where the library is missing.

    One of "amx_bf16", "avx512_bf16", "avx512", "avx2" and "baseline".
    """
    return None if _LIBRARY is None else _kernels


def is_fast() -> bool:
    """Whether the library is there with more than its slowest kernels: those can lose against torch's own."""
    return kernels() not in (None, "baseline")


def choose_kernels(name: str) -> bool:
    """Use the kernels of another instruction set from now on; False where this processor or build lacks them.

    The environment variable VMAMBA_NATIVE_KERNELS makes the choice for a whole process.
    """
    global _kernels
    if _LIBRARY is None or not _LIBRARY.vmamba_choose(name.encode()):
        return False
    _kernels = _LIBRARY.vmamba_kernels().decode()
    return True


def warn_once_if_missing() -> None:
    """Say, the first time a slower backend stands in for this one, why."""
    global _is_warned
    if _WHY_NOT is None or _is_warned or torch.compiler.is_compiling():
        return
    _is_warned = True
    warnings.warn(
        f"the operators run in plain torch, several times slower than they could: {_WHY_NOT}",
        RuntimeWarning,
        stacklevel=3,
    )
