"""The VSS block (paper, figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vmamba.nn import cpu
from vmamba.nn.layers import LayerNorm
from vmamba.nn.local import LocalMlp
from vmamba.nn.mlp import Mlp
from vmamba.nn.norms import Norm, norm_layer
from vmamba.nn.ss2d import SS2D
from vmamba.ops.backends.native.block import Affine, Scan, Told, describe
from vmamba.ops.fused import vss_block
from vmamba.ops.layers import applies, is_compiled, is_plain_tensor, product_dtype


@cpu.known
class VSSBlock(nn.Module):
    """x + SS2D(LayerNorm(x)), then x + MLP(LayerNorm(x)); the vanilla models have no MLP.

    With a local MLP the second step is ReLU(x + MLP(x)).

    Args:
        dim: channels.
        mlp_ratio: hidden channels of the MLP over `dim`; 0 for none.
        drop_path: probability of skipping each branch, per sample, in training.
        proj_drop: rate of the dropout after SS2D and inside the MLP.
        mlp: "pixel" for an MLP at each pixel, "local" for 3×3 convolutions without the LayerNorm (`LocalMlp`).
        norm: before SS2D, and inside it (`SS2D`), "layer" or "batch".
        **ss2d: arguments of `SS2D`.
    """

    PARTS: ClassVar = {
        "norm1": LayerNorm, "ss2d": SS2D, "drop_path1": (nn.Identity, DropPath),
        "norm2": LayerNorm, "mlp": Mlp, "drop_path2": (nn.Identity, DropPath), "act": nn.Identity,
    }  # fmt: skip

    def __init__(
        self, dim: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, proj_drop: float = 0.0, dd: Any = None,
        mlp: Literal["pixel", "local"] = "pixel", norm: Norm = "layer", **ss2d: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        dd = dd or {}
        if mlp not in ("pixel", "local"):
            raise ValueError(f"mlp is {mlp!r}; expected 'pixel' or 'local'")
        self.norm1 = norm_layer(norm, dim, **dd)
        self.ss2d = SS2D(dim, dropout=proj_drop, norm=norm, **ss2d, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp: Any = None
        if mlp_ratio:
            self.norm2: Any = LayerNorm(dim, **dd) if mlp == "pixel" else nn.Identity()
            self.mlp = (Mlp if mlp == "pixel" else LocalMlp)(dim, int(mlp_ratio * dim), drop=proj_drop, **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()
            self.act = nn.ReLU() if mlp == "local" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) to the same."""
        if not torch.is_grad_enabled() and applies(x):
            y = self._infer(x)
            if y is not None:
                return y
        x = x + self.drop_path1(self.ss2d(self.norm1(x)))
        if self.mlp is not None:
            x = self.act(x + self.drop_path2(self.mlp(self.norm2(x))))
        return x

    def _infer(self, x: Tensor) -> Tensor | None:
        """The same in one call, for a block as it was built; None where it has to be computed layer by layer."""
        state = None if is_compiled() else cpu.state_of(self)
        if (state is None and not cpu.as_built(self)) or not self.ss2d.scans_at_once(x):
            return None
        dtype = product_dtype(x)
        situation = state, x.shape, x.dtype, dtype, torch.is_autocast_enabled("cpu")
        told = None if state is None else _TOLD.get(self, situation)
        if told is None:
            described = self._described(x)
            if described is None:
                return None
            if is_compiled():
                return vss_block(x, *described, dtype)
            told = describe(x, *described, dtype)
            if told is None:
                return None
            if state is not None and told.lasts:
                _TOLD.put(self, situation, told)
        return told(x, self.ss2d.decay())

    def _described(
        self, x: Tensor
    ) -> tuple[Affine, Affine, Affine, Scan, Affine, Affine, Sequence[Affine], bool] | None:
        """The arguments of `vss_block` between the image and the dtype; None where it does not know such layers."""
        ss2d, mlp = self.ss2d, self.mlp
        if not cpu.is_depthwise_silu(ss2d.conv, ss2d.conv.in_channels):
            return None
        outer = [self.norm1] if mlp is None else [self.norm1, self.norm2]
        if any(norm.normalized_shape != x.shape[-1:] for norm in outer):
            return None
        if ss2d.norm.normalized_shape != (ss2d.conv.in_channels,):
            return None
        layers = [self.norm1, ss2d.in_proj, ss2d.conv, ss2d.norm, ss2d.out_proj]
        layers += [] if mlp is None else [self.norm2, mlp.fc1, mlp.fc2]
        norm1, in_proj, conv, norm, out_proj, *rest = affine = [Affine.of(layer) for layer in layers]
        scan = ss2d.scanned()
        if not is_plain_tensor(scan.A):  # A is in float32 whatever the parameters are in
            return None
        scanned = scan.x_proj_weight, scan.dt_proj_weight, scan.dt_proj_bias, scan.D
        if not applies(x, *scanned, *(value for layer in affine for value in layer[:2])):
            return None
        return norm1, in_proj, conv, scan, norm, out_proj, rest, ss2d.gated


# What the kernel was last told of each block.
_TOLD: cpu.Memory[Told] = cpu.Memory()
