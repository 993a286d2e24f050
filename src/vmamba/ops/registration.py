"""Registering a function with torch as an operator that every transform of torch understands.

An operator computes at once what torch's own functions would, or is a single node of a compiled graph. Where it is
differentiated forwards or transformed (`torch.func`, `torch.autograd.forward_ad`), inside a compiled graph too, the
plain function that it stands for is taken instead: that happens in the dispatcher, so that whoever calls the operator
gets the right result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("vmamba", "FRAGMENT")


@torch.compiler.assume_constant_result  # what torch.compile of torch 2.11 traces into always says yes
def is_exporting() -> bool:
    """`torch.compiler.is_exporting`."""
    return torch.compiler.is_exporting()


def is_tracing_for_export() -> bool:
    """Whether the graph being traced must stand without this package: torch.export, ONNX or torch.jit.trace."""
    return is_exporting() or torch.jit.is_tracing()


def define(
    schema: str,
    compute: Callable[..., Any],
    *,
    plain: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Callable[..., Sequence[Tensor | None]] | None = None,
    unsaved: int | None = None,
) -> None:
    """Make `torch.ops.vmamba.*`.

    Args:
        schema: name, inputs and results. Tensors, optional ones too, come before all other inputs; results are tensors.
        compute: from values to values; they are not recorded. Results are dense and share no memory.
        plain: the same in differentiable functions of torch.
        fake: the same as `compute` for tensors without values.
        gradient: as the backward of `torch.autograd.Function`, gradient(ctx, *grads); returns one for each tensor among
            the inputs. `ctx.saved_tensors` has these and `ctx.options` the other inputs. None: that of `plain`.
        unsaved: which of the tensors `gradient` does without. It finds None there, and the tensor may be changed before
            the gradients are computed.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    operator = getattr(torch.ops.vmamba, name).default

    def plain_gradient(ctx: Any, *grads: Tensor) -> list[Tensor | None]:
        return pull_back(lambda *tensors: plain(*tensors, *ctx.options), ctx.saved_tensors, grads)

    def below_autograd(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            tensors = [value for value in inputs if value is None or isinstance(value, Tensor)]
            ctx.save_for_backward(*(None if i == unsaved else value for i, value in enumerate(tensors)))
            ctx.options = inputs[len(tensors) :]
            return below_autograd(*inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors  # which can be had once only, where a checkpoint computes them again
            given = SimpleNamespace(saved_tensors=tensors, options=ctx.options, needs_input_grad=ctx.needs_input_grad)
            needed = ctx.needs_input_grad[: len(tensors)]
            results = zip(needed, (gradient or plain_gradient)(given, *grads), strict=True)
            return (*(grad if is_needed else None for is_needed, grad in results), *(None for _ in ctx.options))

    def recorded(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or _has_tangent(inputs):
            return plain(*inputs)
        return (Function.apply if records(*inputs) else below_autograd)(*inputs)

    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, recorded, "Autograd")
    _LIBRARY.impl(name, plain, "FuncTorchBatched")
    torch.library.register_fake(operator, fake, lib=_LIBRARY)


def records(*values: Any) -> bool:
    """Whether autograd records what is computed from these; some may be no tensors."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def pull_back(
    function: Callable[..., Any], values: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of function(*values), from those of its results, for the values that are tensors.

    They are computed by torch's own functions if `function` is, and can then be differentiated again.
    """

    def of_tensors(*given: Tensor) -> Any:
        remaining = iter(given)
        return function(*(value if value is None else next(remaining) for value in values))

    results, pull, *_ = torch.func.vjp(of_tensors, *(value for value in values if value is not None))
    pulled = iter(pull(tuple(grads) if isinstance(results, tuple) else grads[0]))
    return [value if value is None else next(pulled) for value in values]


def _has_tangent(values: Sequence[Any]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(v, level=0).tangent is not None for v in values if isinstance(v, Tensor))
