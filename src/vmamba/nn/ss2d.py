"""SS2D: the token mixer (paper, section 4.2 and figure 3)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba.nn import cpu
from vmamba.nn.layers import ConvSiLU, LayerNorm, Linear
from vmamba.nn.local import ConvNormSiLU
from vmamba.nn.norms import BatchNorm, Norm, check_norm
from vmamba.ops import ss2d_scan
from vmamba.ops.backends.native.block import Scan
from vmamba.ops.exporting import keeps_layers
from vmamba.ops.precision import state_dtype
from vmamba.ops.routes import ROUTES, Pattern, check_pattern, name_of
from vmamba.ops.ss2d import scans_natively

# One node each in a torch.fx graph, as timm's and torchvision's feature extractors make them.
torch.fx.wrap("ss2d_scan")
torch.fx.wrap("state_dtype")

_SCAN = ss2d_scan  # as it is here, before anybody puts another function in its place
_STEP_RANGE, _STEP_FLOOR = (1e-3, 1e-1), 1e-4  # of the initial Δ


@cpu.known
class SS2D(nn.Module):
    """Projection, depthwise convolution, SiLU, selective scans along four routes, LayerNorm, projection.

    Args:
        dim: channels C.
        d_state: states per channel N.
        ssm_ratio: inner channels over outer ones: D = ssm_ratio · C.
        conv_bias: whether the depthwise convolution has a bias.
        gated: whether the result is multiplied by SiLU of a second projection of the input.
        dropout: rate of the dropout after the last projection.
        init: how the state space parameters start, "v0", "v1" or "v2" (`reset_scan_parameters`).
        pattern: the routes, a name in `vmamba.ops.PATTERNS` or a function from (H, W) to four orders over the grid
            (`vmamba.register_pattern`); it may be set anew at any time.
        norm: "layer", as in the paper, or "batch" for a BatchNorm after the depthwise convolution and one after the
            last projection too, which begins as 0. The scans' results have their LayerNorm in either case.

    Parameters of the scan along K routes, with R = ⌈C / 16⌉:
        x_proj_weight: (K, R + 2N, D), makes dt_low, B and C of each route.
        dt_proj_weight, dt_proj_bias: (K, D, R) and (K, D), make the step Δ.
        A_log: (K, D, N), A = -exp(A_log).
        D: (K, D), the skip.
    """

    PARTS: ClassVar = {
        "in_proj": Linear, "conv": ConvSiLU, "norm": LayerNorm, "out_proj": Linear, "proj_norm": nn.Identity,
        "dropout": nn.Dropout,
    }  # fmt: skip
    STEPS: ClassVar = ("mix", "scan", "gated_norm")
    SETTINGS: ClassVar = ("gated", "pattern")
    PARAMETERS: ClassVar = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        conv_bias: bool = False,
        gated: bool = False,
        dropout: float = 0.0,
        init: Literal["v0", "v1", "v2"] = "v0",
        pattern: Pattern = "cross",
        norm: Norm = "layer",
        **dd: Any,
    ) -> None:
        super().__init__()
        if init not in ("v0", "v1", "v2"):
            raise ValueError(f"init is {init!r}; expected 'v0', 'v1' or 'v2'")
        check_pattern(pattern)
        check_norm(norm)
        if d_state < 1:
            raise ValueError(f"d_state is {d_state}; expected at least 1 state per channel")
        inner, rank = int(ssm_ratio * dim), math.ceil(dim / 16)
        self.gated, self.init, self.pattern = gated, init, pattern
        self.in_proj = Linear(dim, 2 * inner if gated else inner, bias=False, **dd)
        self.conv: Any = (
            ConvSiLU(inner, inner, 3, padding=1, groups=inner, bias=conv_bias, **dd)
            if norm == "layer"
            else ConvNormSiLU(inner, conv_bias, **dd)
        )
        self.x_proj_weight = nn.Parameter(torch.empty(ROUTES, rank + 2 * d_state, inner, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(ROUTES, inner, rank, **dd))
        self.dt_proj_bias = nn.Parameter(torch.empty(ROUTES, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(ROUTES, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(ROUTES, inner, **dd))
        self.norm = LayerNorm(inner, **dd)
        self.out_proj = Linear(inner, dim, bias=False, **dd)
        self.proj_norm = nn.Identity() if norm == "layer" else BatchNorm(dim, **dd)
        self.dropout = nn.Dropout(dropout)
        self.reset_scan_parameters()
        self.close()

    @torch.no_grad()
    def reset_scan_parameters(self) -> None:
        """Draw the scan's parameters anew.

        v0: A = -(n + 1), Δ log-uniform in [0.001, 0.1], as in Mamba; v1: A_log normal, dt_* a tenth of a normal draw;
        v2: A = -1, dt_* a tenth of a uniform draw. D is 1.
        """
        _, inner, rank = self.dt_proj_weight.shape
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.ones_(self.D)
        if self.init == "v0":
            self.A_log.copy_(torch.ones_like(self.A_log).cumsum(-1).log())  # of tensors that are sharded as well
            nn.init.uniform_(self.dt_proj_weight, -(rank**-0.5), rank**-0.5)
            low, high = (math.log(bound) for bound in _STEP_RANGE)
            step = torch.empty_like(self.dt_proj_bias, dtype=torch.float32).uniform_(low, high).exp_()
            step.clamp_(min=_STEP_FLOOR)
            self.dt_proj_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        elif self.init == "v1":
            nn.init.normal_(self.A_log)
            nn.init.normal_(self.dt_proj_weight, std=0.1)
            nn.init.normal_(self.dt_proj_bias, std=0.1)
        else:
            nn.init.zeros_(self.A_log)
            nn.init.uniform_(self.dt_proj_weight, 0.0, 0.1)
            nn.init.uniform_(self.dt_proj_bias, 0.0, 0.1)

    def close(self) -> None:
        """Let a branch that ends in a BatchNorm be nothing, as at the beginning."""
        if isinstance(self.proj_norm, BatchNorm):
            nn.init.zeros_(self.proj_norm.bn.weight)

    def extra_repr(self) -> str:
        """What its parts do not show."""
        return f"pattern={self.pattern!r}, d_state={self.A_log.shape[-1]}"

    def forward(self, x: Tensor) -> Tensor:
        """Mix the pixels of (B, H, W, C); returns (B, H, W, C)."""
        return self.dropout(self.proj_norm(self.out_proj(self.gated_norm(*self.mix(self.in_proj(x))))))

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """From the first projection's result to that of the scans, (B, H, W, D), and the gate."""
        x, gate = x.chunk(2, dim=-1) if self.gated else (x, None)
        return self.scan(self.conv(x)), gate

    def scan(self, u: Tensor) -> Tensor:
        """Scan (B, H, W, D) along the four routes and add the results, (B, H, W, D)."""
        # By a name, since graphs hold no functions.
        pattern = self.pattern if isinstance(self.pattern, str) else name_of(self.pattern)
        return ss2d_scan(u, self.x_proj_weight, self.dt_proj_weight, self.dt_proj_bias, self.decay(), self.D, pattern)

    def decay(self) -> Tensor:
        """A, (K, D, N)."""
        return -torch.exp(self.A_log.to(state_dtype(self.A_log)))

    def scans_at_once(self, x: Tensor) -> bool:
        """Whether a call of `scan` in a block of x would do nothing but run the kernel of the CPU."""
        return _is_ours(ss2d_scan) and isinstance(self.pattern, str) and scans_natively(x, self.pattern)

    def scanned(self) -> Scan:
        """The scans' parameters as `vmamba.ops.ss2d_scan` takes them, for a pattern that has a name."""
        assert isinstance(self.pattern, str)
        weights = self.x_proj_weight, self.dt_proj_weight, self.dt_proj_bias
        return Scan(*weights, self.decay(), self.D, self.pattern)

    def gated_norm(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """The scans' result (..., D), normalised and gated."""
        y = self.norm(y)
        return y if gate is None else y * F.silu(gate)


def _is_ours(function: Any) -> bool:
    """Whether a function is `_SCAN`, if only behind what torch.export puts before it, which traces with torch.fx."""
    if keeps_layers() and getattr(function, "__globals__", None) is vars(torch.fx._symbolic_trace):
        function = function.__wrapped__
    return function is _SCAN
