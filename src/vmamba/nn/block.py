"""The VSS block (paper, figure 3)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.nn import cpu
from vmamba.nn.layers import LayerNorm
from vmamba.nn.mlp import Mlp
from vmamba.nn.ss2d import SS2D
from vmamba.ops.layers import applies, is_compiled, product, product_dtype


@cpu.known
class VSSBlock(nn.Module):
    """x + SS2D(LayerNorm(x)), then x + MLP(LayerNorm(x)); the vanilla models have no MLP.

    Args:
        dim: channels.
        mlp_ratio: hidden channels of the MLP over `dim`; 0 for none.
        drop_path: probability of skipping each branch, per sample, in training.
        proj_drop: rate of the dropout after SS2D and inside the MLP.
        **ss2d: arguments of `SS2D`.
    """

    PARTS: ClassVar = {
        "norm1": LayerNorm, "ss2d": SS2D, "drop_path1": (nn.Identity, DropPath),
        "norm2": LayerNorm, "mlp": Mlp, "drop_path2": (nn.Identity, DropPath),
    }  # fmt: skip

    def __init__(
        self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, proj_drop: float = 0.0, dd: Any = None,
        **ss2d: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        dd = dd or {}
        self.norm1 = LayerNorm(dim, **dd)
        self.ss2d = SS2D(dim, dropout=proj_drop, **ss2d, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = None
        if mlp_ratio:
            self.norm2 = LayerNorm(dim, **dd)
            self.mlp = Mlp(dim, int(mlp_ratio * dim), drop=proj_drop, **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to the same."""
        if not (is_compiled() or torch.is_grad_enabled()) and applies(x) and cpu.as_built(self):
            layers = [self.ss2d.out_proj] if self.mlp is None else [self.ss2d.out_proj, self.mlp.fc1, self.mlp.fc2]
            if applies(x, *(value for layer in layers for value in (layer.weight, layer.bias))):
                return self._infer(x)
        x = x + self.drop_path1(self.ss2d(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x

    def _infer(self, x: Tensor) -> Tensor:
        """The same, by stretches of pixels wherever pixels do not mix: they stay in the cache from norm to sum."""
        ss2d, mlp, dtype = self.ss2d, self.mlp, product_dtype(x)
        width = max(ss2d.in_proj.out_features, mlp.fc1.out_features if mlp is not None else 0)
        u = cpu.in_stretches(lambda part: ss2d.in_proj(self.norm1(part)), (x,), width)
        y, gate = ss2d.mix(u)
        del u

        def rest(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
            x = product(ss2d.gated_norm(y, gate).to(dtype), ss2d.out_proj.weight, ss2d.out_proj.bias, residual=x)
            return x if mlp is None else mlp.infer(self.norm2(x).to(dtype), x)

        return cpu.in_stretches(rest, (x, y, gate), width, out=y)
