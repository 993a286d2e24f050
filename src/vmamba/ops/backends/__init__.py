"""Which implementation computes an operator.

Every backend is a module with the same functions, held against `reference` by the same tests. One is chosen, in this
order, by the `backend=` argument, by the `use_backend` context manager, by the environment variable `VMAMBA_BACKEND`,
or automatically: the first of `BACKENDS` that can run on the tensor's device, and that has proven itself there where it
has to (`proving`). "auto" in any of the first three places means the automatic choice.

A compiled or exported graph keeps the backend that was chosen when it was traced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch

from vmamba.ops.backends import eager, native, proving, reference, triton

ENVIRONMENT_VARIABLE = "VMAMBA_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: what users call it.
        module: has `ss2d_scan`, `selective_scan` and, unless `traceable`, their `*_backward`.
        traceable: autograd and tracing go through the implementation itself, so it is called directly and not as a
            registered operator.
        automatic: whether the automatic choice may take it on a device, for a dtype and a pattern; see `proving`.
        unavailable: for a device, why the backend cannot run there, or None when it can.
    """

    name: str
    module: ModuleType
    traceable: bool = False
    automatic: Callable[[torch.device, torch.dtype, str | None], bool] = lambda device, dtype, pattern: True
    unavailable: Callable[[torch.device], str | None] = lambda device: None


def _is_proven_triton(device: torch.device, dtype: torch.dtype, pattern: str | None) -> bool:
    return device.type == "cuda" and proving.is_proven(device, dtype, pattern)  # elsewhere it is interpreted, for tests


BACKENDS: dict[str, Backend] = {
    "native": Backend("native", native, unavailable=native.unavailable),
    # A fast result that may be wrong is no default: on every card it is compared with eager's first.
    "triton": Backend("triton", triton, automatic=_is_proven_triton, unavailable=triton.unavailable),
    "eager": Backend("eager", eager),
    "reference": Backend("reference", reference, traceable=True),
}

_override: ContextVar[str | None] = ContextVar("vmamba_backend", default=None)


def available_backends(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """Every backend's name, with None where it can run on `device` and the reason where it cannot."""
    return {name: backend.unavailable(torch.device(device)) for name, backend in BACKENDS.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of every operator called in the `with` block (of this thread or task).

    Raises:
        ValueError: no backend has that name.
    """
    _known(name, "use_backend()")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def choose_backend(
    argument: str | None, device: torch.device, dtype: torch.dtype = torch.float32, pattern: str | None = None
) -> Backend:
    """The backend for a call; see the module's docstring for the order of precedence.

    Args:
        argument: what the caller asked for, or None.
        device, dtype: of the image or sequence.
        pattern: of a grid's routes along rows and columns; None for `selective_scan`.

    Raises:
        ValueError: no backend has the name asked for.
        RuntimeError: the backend asked for cannot run on `device`; the message says why.
    """
    override, environment = _overriding(), os.environ.get(ENVIRONMENT_VARIABLE)
    if argument is not None:
        name, source = argument, "the argument backend="
    elif override is not None:
        name, source = override, "use_backend()"
    elif environment:
        name, source = environment, f"the environment variable {ENVIRONMENT_VARIABLE}"
    else:
        name, source = "auto", "the default"
    return BACKENDS[_able(name, source, device, dtype, pattern)]


def _overriding() -> str | None:
    return _override.get()


if torch.__version__ < "2.14":  # whose torch.compile cannot read a context variable
    _overriding = torch.compiler.assume_constant_result(_overriding)


@torch.compiler.assume_constant_result
def _able(name: str, source: str, device: torch.device, dtype: torch.dtype, pattern: str | None) -> str:
    """The name asked for, or the one that "auto" means; an error where it cannot run."""
    _known(name, source)
    if name == "auto":
        if device.type == "cpu":
            native.warn_once_if_missing()
        able = (backend for backend in BACKENDS.values() if backend.unavailable(device) is None)
        return next(backend.name for backend in able if backend.automatic(device, dtype, pattern))
    reason = BACKENDS[name].unavailable(device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} (from {source}) cannot run on {device}: {reason}")
    return name


def _known(name: str, source: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} names the backend {name!r}; expected 'auto' or one of {sorted(BACKENDS)}")
