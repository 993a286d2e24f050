"""The S6 recurrence over one sequence (paper, section 3; Mamba, algorithm 2)."""

from __future__ import annotations

import math
from typing import Literal, overload

from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.arguments import ScanArguments
from vmamba.ops.backends import choose_backend
from vmamba.ops.operators import call_operator
from vmamba.ops.precision import state_dtype, without_autocast


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: Literal[False] = False,
    *, backend: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
    *, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t, y_t = C_t · h_t + D u_t along a sequence, from h_0 = 0.

    Names, order and shapes are those of mamba's and VMamba's `selective_scan_fn`, for real numbers. Gradients reach
    every argument, through the last state too, and can be differentiated again. With N = 0, y is the skip alone.

    Args:
        u: (batch, D, L), float16, bfloat16, float32 or float64.
        delta: (batch, D, L), the step before bias and softplus; or (batch, S, L), each shared by D / S neighbouring
            channels.
        A: (D, N), negative.
        B: (D, N), the same at every step; (batch, N, L), shared by all channels; or (batch, G, N, L), each group shared
            by D / G neighbouring channels.
        C: as `B`, independently of it.
        D: (D,), the skip, or None.
        z: (batch, D, L), a gate: the result is multiplied by SiLU(z); or None.
        delta_bias: (D,), or (S,) where `delta` is (batch, S, L), added to `delta`; or None.
        delta_softplus: whether the step is softplus(delta + delta_bias).
        return_last_state: whether to return the state after the last step as well.
        backend: "auto", or a name from `available_backends()`; None leaves the choice to `use_backend`, the environment
            variable VMAMBA_BACKEND and the device, in that order.

    Returns:
        y, (batch, D, L) in the dtype of `u`; with `return_last_state`, (y, h_L) with h_L (batch, D, N). States are
        float32, or float64 as soon as one argument is float64.

    Raises:
        ValueError: a shape or device that does not fit, or an unknown backend.
        TypeError: an argument that is not a real floating-point tensor.
        RuntimeError: the backend asked for cannot run on this device.
    """
    checks.ndim("u", u, 3, "(batch, D, L)")
    checks.ndim("delta", delta, 3, "(batch, D, L) or (batch, S, L)")
    checks.ndim("A", A, 2, "(D, N)")
    checks.real_on_one_device(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    (batch, channels, length), states, steps = u.shape, A.shape[1], delta.shape[1]
    dtype = state_dtype(u, delta, A, B, C, D, z, delta_bias)

    def repeat(value: Tensor, times: int, dim: int) -> Tensor:
        # Not in half precision, where the gradient would be rounded before it is added up.
        return value if times == 1 else value.to(dtype).repeat_interleave(times, dim)

    def in_groups(name: str, value: Tensor) -> Tensor:
        """B or C in any of its three forms as (batch, G, N, L)."""
        if value.ndim == 2:
            checks.shape(name, value, (channels, states), "(D, N)")
            return value.to(dtype)[None, :, :, None].expand(batch, channels, states, length)
        if value.ndim == 3:
            checks.shape(name, value, (batch, states, length), "(batch, N, L)")
            return value.unsqueeze(1)
        checks.shape(name, value, (batch, None, states, length), "(D, N), (batch, N, L) or (batch, G, N, L)")
        checks.groups(name, value.shape[1], channels)
        return value

    checks.groups("delta", steps, channels)
    if delta_bias is not None:
        checks.shape("delta_bias", delta_bias, (steps,), "a number for each channel of delta")
        delta_bias = repeat(delta_bias, channels // steps, 0)
    delta = repeat(delta, channels // steps, 1)
    B, C = in_groups("B", B), in_groups("C", C)
    groups = math.lcm(B.shape[1], C.shape[1])
    B, C = (repeat(value, groups // value.shape[1], 1) for value in (B, C))

    arguments = ScanArguments(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    arguments.check()
    chosen = choose_backend(backend, u.device, u.dtype)
    with without_autocast(u.device):
        y, last_state = call_operator("selective_scan", chosen, arguments)
    return (y, last_state) if return_last_state else y
