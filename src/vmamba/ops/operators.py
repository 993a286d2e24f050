"""The two operators, registered with torch as `torch.ops.vmamba.*`, and their derivatives.

A backend writes a forward and a backward; neither keeps anything for the other but the inputs. What is registered here
joins them: the forward's gradient is the backward operator. The backward's own gradient (for second and higher
derivatives), forward mode and every transform of `torch.func` go through the eager backend, which is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.overrides import _get_current_function_mode_stack as _function_modes
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from vmamba.ops.arguments import ScanArguments, SS2DArguments, empty_gradients
from vmamba.ops.backends import BACKENDS, Backend, eager
from vmamba.ops.exporting import keeps_scans
from vmamba.ops.precision import without_autocast
from vmamba.ops.registration import define, is_tracing_for_export
from vmamba.ops.routes import is_along_axes

_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", bool: "bool"}


def runs_eagerly(*values: Tensor | None) -> bool:
    """Whether what is called with these is computed at once, and nothing traces, watches or transforms it.

    On the meta device nothing is computed at all.
    """
    return (
        all(value is None or (type(value) in (Tensor, torch.nn.Parameter) and not value.is_meta) for value in values)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and _get_current_dispatch_mode() is None
        and not (torch._C._len_torch_function_stack() and any(map(_changes_functions, _function_modes())))
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _changes_functions(mode: TorchFunctionMode) -> bool:
    """Whether a mode may do something else than torch's functions; torch's own default device only makes tensors."""
    return not isinstance(mode, DeviceContext)


def call_operator(name: str, backend: Backend, arguments: ScanArguments | SS2DArguments) -> Any:
    """The operator's results, computed, recorded or traced as the situation needs."""
    # Where nothing watches, the function itself: the dispatcher's detour costs as much as a small model's scan.
    if backend.traceable or (not torch.is_grad_enabled() and runs_eagerly(*arguments[:-1])):
        return getattr(backend.module, name)(arguments)
    if is_tracing_for_export():
        stays = keeps_scans() and isinstance(arguments, SS2DArguments) and is_along_axes(arguments.pattern)
        if not stays:
            return getattr(eager, f"{name}_for_export")(arguments)
    return getattr(torch.ops.vmamba, name)(*arguments, backend.name)


def _register(
    name: str, kind: type[ScanArguments] | type[SS2DArguments], outputs: int, flops: Callable[..., int]
) -> None:
    """Registers the functions `name` and `name`_backward of the backends.

    Both operators take a backend's name after the arguments. The backward operator takes the gradients of the `outputs`
    before them, and is counted as twice the `flops`, as a product's backward is.
    """
    hints = get_type_hints(kind)
    inputs = ", ".join([*(f"{_SCHEMA[hint]} {field}" for field, hint in hints.items()), "str backend"])
    grads = "Tensor grad_y" if outputs == 1 else "Tensor grad_y, Tensor grad_last"
    results, gradients = (f"({', '.join(['Tensor'] * count)})" for count in (outputs, len(hints) - 1))

    def forward(backend: str, values: Sequence[Any]) -> Any:
        with without_autocast(values[0].device):
            return getattr(BACKENDS[backend].module, name)(kind._make(values))

    def backward(backend: str, values: Sequence[Any]) -> tuple[Tensor, ...]:
        with without_autocast(values[0].device):
            function = getattr(BACKENDS[backend].module, f"{name}_backward")
            return function(*values[:outputs], kind._make(values[outputs:]))

    def first_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        operator = getattr(torch.ops.vmamba, f"{name}_backward")
        return operator(*(g.contiguous() for g in grads), *ctx.saved_tensors, *ctx.options)

    define(
        f"{name}({inputs}) -> {results}",
        lambda *values: forward(values[-1], values[:-1]),
        plain=lambda *values: forward("eager", values[:-1]),
        gradient=first_gradient,
        fake=lambda *values: kind._make(values[:-1]).empty_results(),
    )
    define(
        f"{name}_backward({grads}, {inputs}) -> {gradients}",
        lambda *values: backward(values[-1], values[:-1]),
        plain=lambda *values: backward("eager", values[:-1]),
        fake=lambda *values: empty_gradients(kind._make(values[outputs:-1])),
    )
    operators = torch.ops.vmamba
    register_flop_formula(getattr(operators, name))(lambda *shapes, **_: flops(*shapes))
    register_flop_formula(getattr(operators, f"{name}_backward"))(lambda *shapes, **_: 2 * flops(*shapes[outputs:]))


# --- what they cost, for torch.utils.flop_counter ---------------------------------------------------------------------


def _scan_flops(positions: int, channels: int, states: int, rank: int = 0) -> int:
    """Operations of a scan along one route, two a multiply-accumulate, in the convention of the published tables.

    That is 9·L·D·N multiply-accumulates for the recurrence, L·D for the skip, and of SS2D L·D·R for dt_proj.
    """
    return 2 * positions * channels * (9 * states + 1 + rank)


def _flops_of_sequence(u: Sequence[int], delta: Sequence[int], A: Sequence[int], *_: Any) -> int:
    """Of `selective_scan`, from the shapes of its inputs."""
    batch, channels, length = u
    return _scan_flops(batch * length, channels, A[1])


def _flops_of_grid(
    u: Sequence[int], projected: Sequence[int], weight: Sequence[int], bias: Sequence[int], A: Sequence[int], *_: Any
) -> int:
    """Of `ss2d_scan`, likewise."""
    batch, height, width, channels = u
    return A[0] * _scan_flops(batch * height * width, channels, A[2], weight[2])


_register("selective_scan", ScanArguments, 2, _flops_of_sequence)
_register("ss2d_scan", SS2DArguments, 1, _flops_of_grid)
