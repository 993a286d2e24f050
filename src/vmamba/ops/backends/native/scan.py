"""The scans of the CPU kernel: a whole operator in one pass, without copies of the sequence.

Native dtypes are float32, and for SS2D's image and its gradient bfloat16 too; the state is float32. Other arguments in
float16 or bfloat16 are converted to float32 on the way in. As soon as one argument is float64, and for the degenerate
cases N = 0 and R = 0, the call goes to the eager backend.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.arguments import ScanArguments, SS2DArguments, as_gradients, empty_gradients
from vmamba.ops.backends import eager
from vmamba.ops.backends.native.library import compute_function, fields, pointer
from vmamba.ops.precision import state_dtype
from vmamba.ops.routes import get_routes

# The backward pass splits the channels of a batch into about this many tasks, on any number of threads, because the
# split fixes the order in which gradients are added up.
_BACKWARD_TASKS = 64
_BLOCK = 16


class _Scan(ctypes.Structure):
    """`struct Scan` of csrc/scan.h."""

    _fields_ = fields(
        sizes="batch height width channels groups states rank routes slots pixel_stride route_stride group_stride",
        pointers="route_bits u delta dt_low B C dt_weight dt_bias A D y last route_y grad_y grad_last grad_u grad_delta"
        " grad_parameters grad_weights",
        flags="bfloat16 softplus threads",
    )


_call_scan = compute_function("vmamba_scan", _Scan)
_call_scan_backward = compute_function("vmamba_scan_backward", _Scan)


# --- four routes over a grid -----------------------------------------------------------------------------------------


def ss2d_scan(arguments: SS2DArguments) -> Tensor:
    """SS2D's operator on a grid; result as in `reference.ss2d_scan`.

    Raises:
        ValueError: a shape that does not fit, or an unknown pattern.
        RuntimeError: memory ran out.
    """
    u = arguments.u
    if _is_for_eager(arguments):
        return eager.ss2d_scan(arguments)
    y = torch.empty(u.shape, dtype=_image_dtype(u), device="cpu")
    scan, keep = _grid_scan(arguments)
    if u.numel():
        scan.y = y.data_ptr()
        _call_scan(scan)
    del keep
    return y.to(u.dtype)


def ss2d_scan_backward(grad_y: Tensor, arguments: SS2DArguments) -> tuple[Tensor, ...]:
    """Gradients of `ss2d_scan` for its six tensors, in order, from the inputs alone.

    States are computed again, a stretch of the sequence at a time, and never leave the cache.

    Raises:
        ValueError: a shape that does not fit, or an unknown pattern.
        RuntimeError: memory ran out.
    """
    u = arguments.u
    if _is_for_eager(arguments, grad_y):
        return eager.ss2d_scan_backward(grad_y, arguments)
    if not u.numel():
        return _zeros(arguments)
    checks.shape("grad_y", grad_y, tuple(u.shape), "the shape of u, (B, H, W, D)")
    scan, keep = _grid_scan(arguments)
    keep.append(grad := _dense(grad_y, _image_dtype(u)))
    scan.grad_y = grad.data_ptr()
    grad_u, grad_projected, weights = _run_backward(scan)
    grad_weight, grad_bias, grad_A, grad_D = _split_weights(scan, weights)
    grads = (grad_u, grad_projected, grad_weight, grad_bias, grad_A, grad_D.expand(arguments.D.shape))
    return as_gradients(grads, arguments, own=True)


def _grid_scan(arguments: SS2DArguments) -> tuple[_Scan, list[Tensor]]:
    """What the kernel is told of an SS2D, and the tensors that must outlive the call."""
    arguments.check()
    u, *others, pattern = arguments
    image, bits = _dense(u, _image_dtype(u)), route_bits(pattern)
    projected, weight, bias, A, D = (_dense(value) for value in others)
    (batch, height, width, channels), (K, _, N), R = u.shape, A.shape, weight.shape[2]
    scan = _Scan(
        batch=batch, height=height, width=width, channels=channels, groups=1, states=N, rank=R, routes=K,
        pixel_stride=K * (R + 2 * N), route_stride=R + 2 * N, softplus=1, bfloat16=image.dtype == torch.bfloat16,
        route_bits=bits.data_ptr(), u=pointer(image), dt_weight=pointer(weight), dt_bias=pointer(bias),
        A=pointer(A), D=pointer(D),
    )  # fmt: skip
    _complete(scan, projected, R, R + N)
    return scan, [image, projected, weight, bias, A, D]


@functools.cache
def route_bits(pattern: str) -> Tensor:
    """A pattern's routes as the kernel knows them."""
    return torch.tensor([route.bits for route in get_routes(pattern)], dtype=torch.int32, device="cpu")


# --- one sequence ----------------------------------------------------------------------------------------------------


def selective_scan(arguments: ScanArguments) -> tuple[Tensor, Tensor]:
    """Selective scan; results as in `reference.selective_scan`.

    Raises:
        ValueError: a shape that does not fit.
        RuntimeError: memory ran out.
    """
    if _is_for_eager(arguments):
        return eager.selective_scan(arguments)
    y, last = _ungated(*_sequence_scan(arguments))
    if arguments.z is not None:
        y = y * F.silu(arguments.z.float())
    return y.to(arguments.u.dtype).contiguous(), last


def selective_scan_backward(grad_y: Tensor, grad_last: Tensor, arguments: ScanArguments) -> tuple[Tensor, ...]:
    """Gradients of `selective_scan` for its eight tensors, in order; empty for those that are None.

    Raises:
        ValueError: a shape that does not fit.
        RuntimeError: memory ran out.
    """
    u, z = arguments.u, arguments.z
    if _is_for_eager(arguments, grad_y, grad_last):
        return eager.selective_scan_backward(grad_y, grad_last, arguments)
    checks.shape("grad_y", grad_y, tuple(u.shape), "the shape of u, (batch, D, L)")
    checks.shape("grad_last", grad_last, (*u.shape[:2], arguments.A.shape[1]), "(batch, D, N)")
    if not u.numel():
        return _zeros(arguments)
    scan, keep = _sequence_scan(arguments)
    grad, grad_z = grad_y.float(), None
    if z is not None:
        grad, grad_z = eager.gate_backward(grad, _ungated(scan, keep)[0], z.float())
    keep += [grad := _dense(grad.transpose(1, 2)), last := _dense(grad_last)]
    grad_delta = _buffer(*grad.shape)
    scan.grad_y, scan.grad_last, scan.grad_delta = grad.data_ptr(), last.data_ptr(), grad_delta.data_ptr()
    grad_u, grad_parameters, weights = _run_backward(scan)
    _, grad_bias, grad_A, grad_D = _split_weights(scan, weights)
    batch, _, length = u.shape
    grad_B, grad_C = grad_parameters.view(batch, length, 2, *arguments.B.shape[1:3]).permute(2, 0, 3, 4, 1)
    grads = (
        grad_u.view(grad.shape).transpose(1, 2), grad_delta.transpose(1, 2), grad_A, grad_B, grad_C, grad_D, grad_z,
        grad_bias,
    )  # fmt: skip
    return as_gradients(grads, arguments, own=True)


def _sequence_scan(arguments: ScanArguments) -> tuple[_Scan, list[Tensor]]:
    """What the kernel is told of a sequence (a grid of one row, time before channels), and the tensors to keep."""
    arguments.check()
    u, delta, A, B, C, D, _, delta_bias, delta_softplus = arguments
    (batch, channels, length), N, groups = u.shape, A.shape[1], B.shape[1]
    x, step = (_dense(value.transpose(1, 2)) for value in (u, delta))
    parameters = _buffer(batch, length, 2, groups, N)
    parameters[:, :, 0], parameters[:, :, 1] = B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2)
    keep = [x, step, parameters, _dense(A), torch.zeros(1, dtype=torch.int32, device="cpu")]
    scan = _Scan(
        batch=batch, height=1, width=length, channels=channels, groups=groups, states=N, rank=0, routes=1,
        pixel_stride=2 * groups * N, group_stride=N, softplus=delta_softplus, u=pointer(x), delta=pointer(step),
        A=pointer(keep[3]), route_bits=keep[4].data_ptr(),
    )  # fmt: skip
    for field, vector in (("D", D), ("dt_bias", delta_bias)):
        if vector is not None:
            keep.append(_dense(vector))
            setattr(scan, field, pointer(keep[-1]))
    _complete(scan, parameters, 0, groups * N)
    return scan, keep


def _ungated(scan: _Scan, keep: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The result before the gate (batch, D, L), and the last state (batch, D, N)."""
    y = _buffer(scan.batch, scan.width, scan.channels)
    last = _buffer(scan.batch, scan.channels, scan.states).zero_()
    if y.numel():
        scan.y, scan.last = y.data_ptr(), last.data_ptr()
        _call_scan(scan)
    return y.transpose(1, 2), last


# --- both ------------------------------------------------------------------------------------------------------------


def _is_for_eager(arguments: ScanArguments | SS2DArguments, *grads: Tensor) -> bool:
    tensors = (*arguments[:-1], *grads)
    return state_dtype(*tensors) == torch.float64 or 0 in (arguments.A.shape[-1], arguments[2].shape[-1])


def _image_dtype(u: Tensor) -> torch.dtype:
    return torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32


def _dense(value: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    if value.device.type != "cpu":
        raise ValueError(f"the native backend was given a tensor on {value.device}; it runs on the CPU only")
    return value.detach().to(dtype).contiguous()


def _buffer(*shape: int) -> Tensor:
    """Fresh memory, whatever dtype and device the user has made the default."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _zeros(arguments: ScanArguments | SS2DArguments) -> tuple[Tensor, ...]:
    return tuple(value.zero_() for value in empty_gradients(arguments))


def _complete(scan: _Scan, parameters: Tensor, B_offset: int, C_offset: int) -> None:
    """dt_low, B and C begin at these offsets of `parameters`."""
    scan.dt_low = begin = pointer(parameters)
    scan.B, scan.C = (begin + offset * parameters.element_size() for offset in (B_offset, C_offset))
    scan.threads = torch.get_num_threads()


def _blocks(scan: _Scan) -> int:
    """Blocks of neighbouring channels; a block lies within one group."""
    return scan.groups * -(-(scan.channels // scan.groups) // _BLOCK)


def _run_backward(scan: _Scan) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, of the parameters where those lie (flat), and of everything that has no batch (flat)."""
    batch, positions, channels = scan.batch, scan.height * scan.width, scan.channels
    scan.slots = min(_blocks(scan), -(-_BACKWARD_TASKS // batch))
    grad_u = _buffer(batch * positions * channels)
    grad_parameters = _buffer(scan.slots, batch * positions * scan.pixel_stride)
    weights = _buffer(batch, scan.routes * channels * (scan.rank + 1 + scan.states) + channels)
    scan.grad_u = grad_u.data_ptr()
    scan.grad_parameters, scan.grad_weights = grad_parameters.data_ptr(), weights.data_ptr()
    _call_scan_backward(scan)
    return grad_u, grad_parameters[0], weights[0]


def _split_weights(scan: _Scan, weights: Tensor) -> list[Tensor]:
    """Gradients of dt_weight, dt_bias, A and D (the last for all routes together), each flat."""
    per_route = scan.routes * scan.channels
    return list(weights.split([per_route * scan.rank, per_route, per_route * scan.states, scan.channels]))
