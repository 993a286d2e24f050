"""The block's channel mixer (paper, figure 3), frugal with memory on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.nn import cpu
from vmamba.nn.layers import GELU, Linear
from vmamba.ops.layers import (
    applies,
    fuses_linear_gelu,
    gelu,
    gelu_backward,
    is_compiled,
    is_on_gpu,
    is_one_each,
    linear_gelu,
    product,
    product_dtype,
    records,
)
from vmamba.ops.registration import pull_back


@cpu.known
class Mlp(timm.layers.Mlp):
    """timm's `Mlp`: Linear, GELU, dropout, Linear, dropout on the last dimension.

    As it was built, on the CPU, it works by stretches of pixels in inference, and in training keeps the hidden layer as
    it is before the GELU, and nothing else of it. In inference on a GPU, in half precision, the first product takes
    the GELU with it.
    """

    PARTS: ClassVar = {
        "fc1": Linear, "act": GELU, "drop1": nn.Dropout, "norm": nn.Identity, "fc2": Linear, "drop2": nn.Dropout,
    }  # fmt: skip
    fc1: nn.Linear
    fc2: nn.Linear

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, **dd: Any) -> None:
        super().__init__(dim, hidden, act_layer=GELU, drop=drop, **dd)
        self.fc1, self.fc2 = Linear(dim, hidden, **dd), Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        if self._activates_in_the_product(x):
            hidden = linear_gelu(x, self.fc1.weight, self.fc1.bias)
            return self.drop2(self.fc2(self.norm(self.drop1(hidden))))
        if is_compiled() or not (applies(x) and cpu.as_built(self)) or x.shape[-1] != self.fc1.in_features:
            return super().forward(x)
        parameters = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        if not (applies(x, *parameters) and all(map(is_one_each, parameters[1::2], parameters[::2]))):
            return super().forward(x)
        dtype = product_dtype(x)
        if not records(x, *parameters):
            return cpu.in_stretches(lambda part: self.infer(part.to(dtype)), x, self.fc1.out_features)
        x, weight1, bias1, weight2, bias2 = (v if v is None else v.to(dtype) for v in (x, *parameters))
        y = _FrugalMlp.apply(x.reshape(-1, x.shape[-1]), weight1, bias1, weight2, bias2)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _activates_in_the_product(self, x: Tensor) -> bool:
        """Whether the first two layers may be one kernel of a GPU's."""
        is_usual = is_on_gpu(x) and cpu.is_plain(self.fc1, Linear) and cpu.is_plain(self.act, GELU)
        return is_usual and fuses_linear_gelu(x, self.fc1.weight, self.fc1.bias)

    def infer(self, x: Tensor) -> Tensor:
        """Of an MLP as it was built, without autograd: its result, (..., C)."""
        hidden = product(x, self.fc1.weight, self.fc1.bias, "gelu")
        return product(hidden, self.fc2.weight, self.fc2.bias)


class _FrugalMlp(torch.autograd.Function):
    """Rows (M, C) through Linear, GELU, Linear; on the way back the GELU is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None
    ) -> Tensor:
        hidden, y = [], x.new_empty(len(x), len(weight2))
        for part, result in zip(cpu.stretches(x, len(weight1)), cpu.stretches(y, len(weight1)), strict=True):
            hidden.append(product(part, weight1, bias1))
            result.copy_(product(gelu(hidden[-1]), weight2, bias2))
        ctx.save_for_backward(x, weight1, bias1, weight2, *hidden)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, bias1, weight2, *hidden = ctx.saved_tensors
        values = x, weight1, bias1, weight2
        needs_x, needs_weight1, needs_bias1, needs_weight2, needs_bias2 = ctx.needs_input_grad
        grad_bias2 = grad.sum(0) if needs_bias2 else None
        if torch.is_grad_enabled():  # to be differentiated again
            return *pull_back(_plain_mlp, values, [grad]), grad_bias2
        if torch._C._functorch.is_legacy_batchedtensor(grad):  # several gradients at once, which no kernel can read
            return *_plain_gradients(values, grad), grad_bias2

        grad_x, grad_weight1, grad_weight2 = (torch.empty_like(value) for value in (x, weight1, weight2))
        grad_bias1 = grad.new_zeros(len(weight1))
        parts = (cpu.stretches(value, len(weight1)) for value in (x, grad, grad_x))
        for i, (h, x_part, grad_part, grad_x_part) in enumerate(zip(hidden, *parts, strict=True)):
            activated, grad_h = gelu_backward(product(grad_part, weight2.t()), h)
            if needs_weight2:
                grad_weight2.addmm_(grad_part.t(), activated, beta=int(i > 0))
            if needs_weight1:
                grad_weight1.addmm_(grad_h.t(), x_part, beta=int(i > 0))
            if needs_bias1:
                grad_bias1 += grad_h.sum(0)
            if needs_x:
                grad_x_part.copy_(product(grad_h, weight1.t()))
        grads = (grad_x, grad_weight1, grad_bias1, grad_weight2, grad_bias2)
        return tuple(value if needed else None for value, needed in zip(grads, ctx.needs_input_grad, strict=True))


def _plain_gradients(values: Sequence[Tensor | None], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `_plain_mlp` of these values by torch's own functions."""
    with torch.enable_grad():
        leaves: list[Any] = [value if value is None else value.detach().requires_grad_() for value in values]
        y = _plain_mlp(*leaves)
    found = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad))
    return tuple(value if value is None else next(found) for value in values)


def _plain_mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor) -> Tensor:
    """The MLP but for its last bias, on which no other gradient depends."""
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2)
