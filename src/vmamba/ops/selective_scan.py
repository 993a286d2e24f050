"""The S6 recurrence over one sequence (paper, section 3; Mamba, algorithm 2)."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.arguments import ScanArguments
from vmamba.ops.backends import choose_backend
from vmamba.ops.operators import call_operator
from vmamba.ops.precision import without_autocast


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

    Names, order and shapes are those of mamba's `selective_scan_fn`. Gradients reach every argument, through the last
    state too, and can be differentiated again.

    Args:
        u: (batch, D, L), float16, bfloat16, float32 or float64.
        delta: (batch, D, L), the step before bias and softplus.
        A: (D, N), negative.
        B: (D, N), the same at every step; (batch, N, L), shared by all channels; or (batch, G, N, L), each group shared
            by D / G neighbouring channels.
        C: as `B`, independently of it.
        D: (D,), the skip, or None.
        z: (batch, D, L), a gate: the result is multiplied by SiLU(z); or None.
        delta_bias: (D,), added to `delta`, or None.
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
    checks.ndim("A", A, 2, "(D, N)")
    checks.real_on_one_device(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    channels, states = u.shape[1], A.shape[1]
    B, C = (_as_groups(name, value, u, states) for name, value in (("B", B), ("C", C)))
    if B.shape[1] != C.shape[1]:
        groups = max(B.shape[1], C.shape[1])
        if groups % B.shape[1] or groups % C.shape[1]:
            groups = channels
        B, C = (value.repeat_interleave(groups // value.shape[1], dim=1) for value in (B, C))
    arguments = ScanArguments(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    arguments.check()
    chosen = choose_backend(backend, u.device)
    with without_autocast(u.device):
        y, last_state = call_operator("selective_scan", chosen, arguments)
    return (y, last_state) if return_last_state else y


def _as_groups(name: str, value: Tensor, u: Tensor, states: int) -> Tensor:
    """B or C in any of its three forms as (batch, G, N, L)."""
    batch, channels, length = u.shape
    if value.ndim == 2:
        checks.shape(name, value, (channels, states), "(D, N)")
        return value[None, :, :, None].expand(batch, channels, states, length)
    if value.ndim == 3:
        checks.shape(name, value, (batch, states, length), "(batch, N, L)")
        return value.unsqueeze(1)
    checks.shape(name, value, (batch, None, states, length), "(D, N), (batch, N, L) or (batch, G, N, L)")
    checks.groups(name, value.shape[1], channels)
    return value
