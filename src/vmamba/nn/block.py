"""The VSS block (paper, figure 3)."""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

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

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to the same."""
        x = x + self.drop_path1(self.ss2d(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x
