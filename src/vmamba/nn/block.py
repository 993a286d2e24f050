"""The VSS block (paper, figure 3)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.nn import cpu
from vmamba.nn.mlp import Mlp
from vmamba.nn.ss2d import SS2D


class VSSBlock(nn.Module):
    """x + SS2D(LayerNorm(x)), then x + MLP(LayerNorm(x)); the vanilla models have no MLP.

    Args:
        dim: channels.
        mlp_ratio: hidden channels of the MLP over `dim`; 0 for none.
        drop_path: probability of skipping each branch, per sample, in training.
        proj_drop: rate of the dropout after SS2D and inside the MLP.
        **ss2d: arguments of `SS2D`.
    """

    def __init__(
        self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, proj_drop: float = 0.0, dd: Any = None,
        **ss2d: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        dd = dd or {}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.ss2d = SS2D(dim, dropout=proj_drop, **ss2d, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = None
        if mlp_ratio:
            self.norm2 = nn.LayerNorm(dim, **dd)
            self.mlp = Mlp(dim, int(mlp_ratio * dim), drop=proj_drop, **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
        self.width = max(int(mlp_ratio * dim), self.ss2d.in_proj.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to the same."""
        if cpu.is_inference(self, x) and cpu.is_unwatched(self):
            return self._infer(x)
        x = x + self.drop_path1(self.ss2d(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x

    def _infer(self, x: Tensor) -> Tensor:
        """The same, by stretches of pixels wherever pixels do not mix: they stay in the cache from norm to sum."""
        call = cpu.caller(self, x)
        y, gate = self.ss2d.mix(
            cpu.in_stretches(lambda part: call(self.ss2d.in_proj, call(self.norm1, part)), x, self.width), call
        )
        y, dtype = y.contiguous(), torch.promote_types(x.dtype, y.dtype)
        result = y if (y.shape, y.dtype) == (x.shape, dtype) else y.new_empty(x.shape, dtype=dtype)

        pieces = [cpu.stretches(value.flatten(0, -2), self.width) for value in (x, y, result)]
        gates = [None] * len(pieces[0]) if gate is None else cpu.stretches(gate.flatten(0, -2), self.width)
        for x_part, y_part, result_part, gate_part in zip(*pieces, gates, strict=True):
            torch.add(x_part, self.ss2d.project(y_part, gate_part, call), out=result_part)
            if self.mlp is not None:
                result_part.add_(self.mlp(call(self.norm2, result_part)))
        return result
