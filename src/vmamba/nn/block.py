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
from vmamba.ops.layers import applies, is_compiled


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
        if not is_compiled() and not torch.is_grad_enabled() and applies(x) and cpu.as_built(self):
            return self._infer(x)
        x = x + self.drop_path1(self.ss2d(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x

    def _infer(self, x: Tensor) -> Tensor:
        """The same, by stretches of pixels wherever pixels do not mix: they stay in the cache from norm to sum."""
        ss2d, mlp = self.ss2d, self.mlp
        width = max(ss2d.in_proj.out_features, mlp.fc1.out_features if mlp is not None else 0)
        u = cpu.in_stretches(lambda part: ss2d.in_proj(self.norm1(part)), x, width)
        y, gate = ss2d.mix(u)
        y, dtype = y.contiguous(), torch.promote_types(x.dtype, y.dtype)
        result = y if (y.shape, y.dtype) == (x.shape, dtype) else y.new_empty(x.shape, dtype=dtype)

        pieces = [cpu.stretches(value.flatten(0, -2), width) for value in (x, y, result)]
        gates = [None] * len(pieces[0]) if gate is None else cpu.stretches(gate.flatten(0, -2), width)
        for x_part, y_part, result_part, gate_part in zip(*pieces, gates, strict=True):
            torch.add(x_part, ss2d.project(y_part, gate_part), out=result_part)
            if mlp is not None:
                result_part.add_(mlp(self.norm2(result_part)))
        return result
