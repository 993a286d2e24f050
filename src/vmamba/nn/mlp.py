"""The block's channel mixer (paper, figure 3), frugal with memory on the CPU."""

from __future__ import annotations

from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.nn import packed
from vmamba.ops.registration import runs_eagerly

# Values of the hidden layer that are computed at a time, 8 MB in float32. A larger tensor costs more to obtain than to
# fill: the operating system has to clear its pages first.
_STRETCH = 2**21
_LAYERS = {
    "fc1": nn.Linear, "act": nn.GELU, "drop1": nn.Dropout, "norm": nn.Identity, "fc2": nn.Linear, "drop2": nn.Dropout,
}  # fmt: skip


class Mlp(timm.layers.Mlp):
    """timm's `Mlp`: Linear, GELU, dropout, Linear, dropout on the last dimension.

    On the CPU the pixels are taken in stretches, so that the hidden layer never exists as a whole; training keeps it as
    it is before the GELU, and nothing else of it.
    """

    fc1: nn.Linear
    fc2: nn.Linear
    drop1: nn.Dropout
    drop2: nn.Dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        if not self._is_frugal(x):
            return super().forward(x)
        dtype = packed.autocast_dtype(x)
        rows = x.flatten(0, -2)
        if torch.is_grad_enabled():
            parameters = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            return _FrugalMlp.apply(rows.to(dtype), *(value.to(dtype) for value in parameters)).view(x.shape)
        call = packed.caller(self, x)
        y = torch.empty_like(rows, dtype=dtype)
        for result, part in zip(*(_stretches(v, self.fc1.out_features) for v in (y, rows)), strict=True):
            result.copy_(call(self.fc2, call(self.fc1, part, "gelu")))
        return y.view(x.shape)

    def _is_frugal(self, x: Tensor) -> bool:
        if not runs_eagerly(x) or x.device.type != "cpu" or (self.training and (self.drop1.p or self.drop2.p)):
            return False
        return all(packed.is_plain(getattr(self, name), kind) for name, kind in _LAYERS.items())


def _stretches(rows: Tensor, hidden: int) -> tuple[Tensor, ...]:
    """As few equal parts of the rows as keep the hidden layer to `_STRETCH`."""
    return rows.tensor_split(max(1, -(-len(rows) * hidden // _STRETCH)))


class _FrugalMlp(torch.autograd.Function):
    """Rows (M, C) through Linear, GELU, Linear; on the way back the GELU is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        hidden, y = [], torch.empty_like(x)
        for part, result in zip(_stretches(x, len(weight1)), _stretches(y, len(weight1)), strict=True):
            hidden.append(packed.product(part, weight1, bias1))
            result.copy_(packed.product(F.gelu(hidden[-1]), weight2, bias2))
        ctx.save_for_backward(x, weight1, bias1, weight2, bias2, *hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2, bias2, *hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            inputs = (x, weight1, bias1, weight2, bias2)
            wanted = [value for value, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
            y = F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
            grads = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)

        grad_x, grad_bias1 = torch.empty_like(x), torch.zeros_like(bias1)
        grad_weight1, grad_weight2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
        parts = (_stretches(value, len(weight1)) for value in (x, grad, grad_x))
        for h, x_part, grad_part, grad_x_part in zip(hidden, *parts, strict=True):
            grad_weight2.addmm_(grad_part.t(), F.gelu(h))
            grad_h = torch.ops.aten.gelu_backward(packed.product(grad_part, weight2.t()), h)
            grad_weight1.addmm_(grad_h.t(), x_part)
            grad_bias1 += grad_h.sum(0)
            grad_x_part.copy_(packed.product(grad_h, weight1.t()))
        return grad_x, grad_weight1, grad_bias1, grad_weight2, grad.sum(0)
