"""The two norms that a network may have, and the choice between them."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from vmamba.nn.layers import LayerNorm

Norm = Literal["layer", "batch"]


class BatchNorm(nn.Module):
    """`torch.nn.BatchNorm2d` of grids (B, H, W, C): each channel over pixels and images.

    It holds the layer instead of being one, so that `torch.nn.SyncBatchNorm.convert_sync_batchnorm` finds it.
    """

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        y: Tensor = self.bn(x.permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1)


def check_norm(norm: Norm) -> None:
    """Require a known norm.

    Raises:
        ValueError: it is neither "layer" nor "batch".
    """
    if norm not in ("layer", "batch"):
        raise ValueError(f"norm is {norm!r}; expected 'layer' or 'batch'")


def norm_layer(norm: Norm, dim: int, **dd: Any) -> Any:
    """A norm of grids with so many channels: LayerNorm or BatchNorm.

    Raises:
        ValueError: as of `check_norm`.
    """
    check_norm(norm)
    return LayerNorm(dim, **dd) if norm == "layer" else BatchNorm(dim, **dd)
