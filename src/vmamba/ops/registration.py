"""Differentiation rules for the registered operators, `torch.ops.vmamba.*`.

A backend writes a forward and a backward; neither keeps anything for the other but the inputs. The rules here join
them: the forward's gradient is the backward operator, and the backward's own gradient (for second and higher
derivatives) is taken through the eager backend's backward, which is plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


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


def as_result(value: Tensor, like: Tensor) -> Tensor:
    """`value` in the shape and dtype of `like`, dense, and no piece of a larger tensor, as operators must return it."""
    value = value.reshape(like.shape).to(like.dtype).contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def register_gradients(
    forward: Any, backward: Any, traceable_backward: Callable[..., list[Tensor]], outputs: int
) -> None:
    """Register fake and autograd rules for a pair of custom operators.

    Args:
        forward: custom_op(*tensors, *options, backend); tensors may be None, options are strings or booleans.
        backward: custom_op(*gradients of the outputs, *tensors, *options, backend), returning the gradients of those
            tensors that are not None, in order.
        traceable_backward: the same without `backend`, in differentiable torch functions.
        outputs: how many tensors `forward` returns.
    """

    def is_tensor_slot(value: object) -> bool:
        return not isinstance(value, (str, bool))

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [value for value in inputs if is_tensor_slot(value)]
        ctx.save_for_backward(*tensors)
        ctx.options = inputs[len(tensors) :]

    def spread(
        gradients: list[Tensor], tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        remaining = iter(gradients)
        return (*(None if tensor is None else next(remaining) for tensor in tensors), *(None for _ in options))

    def forward_gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        return spread(backward(*(g.contiguous() for g in grads), *tensors, *ctx.options), tensors, ctx.options)

    def backward_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
        tensors, options = ctx.saved_tensors, ctx.options[:-1]

        def function(*given: Tensor) -> list[Tensor]:
            return traceable_backward(*spread(list(given), tensors, ())[: len(tensors)], *options)

        pull_back = torch.func.vjp(function, *(t for t in tensors if t is not None))[1]
        return spread(list(pull_back(list(grads))), tensors, ctx.options)

    def fake_backward(*arguments: Any) -> list[Tensor]:
        tensors = [value for value in arguments if is_tensor_slot(value)][outputs:]
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors if t is not None]

    backward.register_fake(fake_backward)
    forward.register_autograd(forward_gradient, setup_context=save)
    backward.register_autograd(backward_gradient, setup_context=save)
