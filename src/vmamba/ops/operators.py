"""The two operators, registered with torch as `torch.ops.vmamba.*`: calls, shapes without values, and derivatives.

A backend writes a forward and a backward; neither keeps anything for the other but the inputs. What is registered here
joins them: the forward's gradient is the backward operator, and the backward's own gradient (for second and higher
derivatives) is taken through the eager backend's backward, which is plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from vmamba.ops.arguments import ScanArguments, SS2DArguments
from vmamba.ops.backends import BACKENDS, Backend, eager
from vmamba.ops.precision import without_autocast

_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", str: "str", bool: "bool"}


def is_tracing_for_export() -> bool:
    """Whether the graph being traced must stand without this package: torch.export, ONNX or torch.jit.trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def runs_eagerly(value: Tensor) -> bool:
    """Whether what is called with `value` is computed at once, and nothing traces, watches or transforms it."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and _get_current_dispatch_mode() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def call_operator(name: str, backend: Backend, arguments: ScanArguments | SS2DArguments) -> Any:
    """The operator's results, computed, recorded or traced as the situation needs."""
    # Where nothing watches, the function itself: the dispatcher's detour costs as much as a small model's scan.
    if backend.traceable or (not torch.is_grad_enabled() and runs_eagerly(arguments.u)):
        return getattr(backend.module, name)(arguments)
    if is_tracing_for_export():
        return getattr(eager, f"{name}_for_export")(arguments)
    return getattr(torch.ops.vmamba, name)(*arguments, backend.name)


def _register(name: str, kind: type[ScanArguments] | type[SS2DArguments], outputs: int) -> None:
    """Registers the functions `name` and `name`_backward of the backends.

    As operators they take a backend's name after their arguments; the backward operator takes the gradients of the
    `outputs` before them, and returns those of the tensors that are not None, in order.
    """
    fields = [f"{_SCHEMA[hint]} {field}" for field, hint in get_type_hints(kind).items()]
    grads = ["Tensor grad_y", "Tensor grad_last"][:outputs]
    result = "Tensor" if outputs == 1 else "(Tensor, Tensor)"

    def run(function: str, arguments: Any, *grads: Tensor) -> Any:
        *values, backend = arguments
        with without_autocast(values[0].device):
            return getattr(BACKENDS[backend].module, function)(*grads, kind._make(values))

    @torch.library.custom_op(
        f"vmamba::{name}", mutates_args=(), schema=f"({', '.join([*fields, 'str backend'])}) -> {result}"
    )
    def forward(*arguments: Any) -> Any:
        return run(name, arguments)

    @torch.library.custom_op(
        f"vmamba::{name}_backward", mutates_args=(),
        schema=f"({', '.join([*grads, *fields, 'str backend'])}) -> Tensor[]",
    )  # fmt: skip
    def backward(*arguments: Any) -> list[Tensor]:
        return run(f"{name}_backward", arguments[outputs:], *arguments[:outputs])

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, option, backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = option, backend

    def spread(gradients: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        remaining = iter(gradients)
        return [None if tensor is None else next(remaining) for tensor in tensors]

    def forward_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        return (*spread(backward(*(g.contiguous() for g in grads), *tensors, *ctx.options), tensors), None, None)

    def backward_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
        tensors, option = ctx.saved_tensors, ctx.options[0]

        def function(*given: Tensor) -> list[Tensor]:
            values = spread(given, tensors)
            return getattr(eager, f"{name}_backward")(*values[:outputs], kind._make((*values[outputs:], option)))

        pull_back = torch.func.vjp(function, *(t for t in tensors if t is not None))[1]
        return (*spread(pull_back(list(grads)), tensors), None, None)

    forward.register_fake(lambda *arguments: kind._make(arguments[:-1]).empty_results())
    backward.register_fake(
        lambda *arguments: [
            torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in arguments[outputs:-2] if t is not None
        ]
    )
    forward.register_autograd(forward_gradient, setup_context=save)
    backward.register_autograd(backward_gradient, setup_context=save)


_register("selective_scan", ScanArguments, outputs=2)
_register("ss2d_scan", SS2DArguments, outputs=1)
