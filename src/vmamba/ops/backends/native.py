"""The CPU kernel in C++ (`csrc/`): a whole operator in one pass, without copies of the sequence.

The library has a plain C interface and is loaded through ctypes, so one build serves every version of Python and torch,
and calls release the GIL. Here every shape is checked before a pointer is handed over.

Native dtypes are float32, and for SS2D's image and its gradient bfloat16 too; the state is float32. Other arguments in
float16 or bfloat16 are converted to float32 on the way in. As soon as one argument is float64, and for the degenerate
cases N = 0 and R = 0, the call goes to the eager backend.

Results do not depend on the number of threads, which is torch's (`torch.set_num_threads`). The threads are those of
torch's own OpenMP runtime where that can be found; a process forked from one that has used them works with one thread.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba.ops import checks
from vmamba.ops.backends import eager
from vmamba.ops.precision import state_dtype
from vmamba.ops.registration import as_result
from vmamba.ops.routes import get_routes

LIBRARY_VARIABLE = "VMAMBA_NATIVE_LIBRARY"
KERNELS_VARIABLE = "VMAMBA_NATIVE_KERNELS"

_INTERFACE = 2
# Below this many steps of 16 channels, waking other threads takes longer than the work.
_STEPS_FOR_THREADS = 512
# The backward pass splits the channels of a batch into about this many tasks, on any number of threads, because the
# split fixes the order in which gradients are added up.
_BACKWARD_TASKS = 64
_BLOCK = 16


class _Problem(ctypes.Structure):
    """`struct Problem` of csrc/scan.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "batch", "height", "width", "channels", "groups", "states", "rank", "routes", "slots",
            "pixel_stride", "route_stride", "group_stride",
        )),
        *((name, ctypes.c_void_p) for name in (
            "route_bits", "u", "delta", "dt_low", "B", "C", "dt_weight", "dt_bias", "A", "D", "y", "last", "route_y",
            "grad_y", "grad_last", "grad_u", "grad_delta", "grad_parameters", "grad_weights",
        )),
        *((name, ctypes.c_int64) for name in ("B_offset", "C_offset")),
        *((name, ctypes.c_int32) for name in ("bfloat16", "softplus", "threads")),
    )  # fmt: skip


def _find() -> Path | None:
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Path(named)
    # An editable install keeps the library with the installed packages and the sources elsewhere: the path has both.
    places = (Path(place) / "_native.so" for place in sys.modules[__package__].__path__)
    return next((place for place in places if place.exists()), None)


def _openmp_parallel() -> int | None:
    """Address of GOMP_parallel in torch's OpenMP runtime; importing torch makes its symbols global."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError):
        return None


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    path = _find()
    if path is None:
        return None, (
            "the CPU kernel was not built; it needs a C++ compiler (GCC 12 or Clang 15, or newer) when the package is"
            " installed: install one and run `pip install --force-reinstall --no-deps vmamba`"
        )
    try:
        library = ctypes.CDLL(str(path))
        interface, size = library.vmamba_interface(), library.vmamba_problem_size()
    except (OSError, AttributeError) as error:
        return None, f"the CPU kernel {path} could not be loaded: {error}"
    if (interface, size) != (_INTERFACE, ctypes.sizeof(_Problem)):
        return None, f"the CPU kernel {path} belongs to another version of this package; reinstall it"
    library.vmamba_kernels.restype = ctypes.c_char_p
    library.vmamba_use_openmp.argtypes = [ctypes.c_void_p]
    library.vmamba_choose.argtypes = [ctypes.c_char_p]
    for function in (library.vmamba_forward, library.vmamba_backward):
        function.argtypes = [ctypes.POINTER(_Problem)]
    library.vmamba_initialise()
    library.vmamba_use_openmp(_openmp_parallel())
    kernels = os.environ.get(KERNELS_VARIABLE, "")
    if not library.vmamba_choose(kernels.encode()):
        return None, f"{KERNELS_VARIABLE} is {kernels!r}; this processor and this build have no such kernels"
    return library, None


_LIBRARY, _WHY_NOT = _load()
_is_warned = False


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on `device`, or None when it can."""
    if device.type != "cpu":
        return "it runs on the CPU only"
    return _WHY_NOT


def library() -> ctypes.CDLL | None:
    """The loaded library, or None where it is missing."""
    return _LIBRARY


def kernels() -> str | None:
    """The instruction set in use ("avx512", "avx2" or "baseline"), or None where the library is missing."""
    return None if _LIBRARY is None else _LIBRARY.vmamba_kernels().decode()


def choose_kernels(name: str) -> bool:
    """Use the kernels of another instruction set from now on; False where this processor or build lacks them.

    The environment variable VMAMBA_NATIVE_KERNELS makes the choice for a whole process.
    """
    return _LIBRARY is not None and bool(_LIBRARY.vmamba_choose(name.encode()))


def warn_once_if_missing() -> None:
    """Say, the first time a slower backend stands in for this one, why."""
    global _is_warned
    if _WHY_NOT is None or _is_warned or torch.compiler.is_compiling():
        return
    _is_warned = True
    warnings.warn(
        f"the operators run in plain torch, several times slower than they could: {_WHY_NOT}",
        RuntimeWarning,
        stacklevel=3,
    )


# --- four routes over a grid -----------------------------------------------------------------------------------------


def ss2d_scan(
    u: Tensor, projected: Tensor, dt_proj_weight: Tensor, dt_proj_bias: Tensor, A: Tensor, D: Tensor, pattern: str
) -> Tensor:
    """SS2D's operator on a grid; arguments and result as in `reference.ss2d_scan`.

    Raises:
        ValueError: a shape that does not fit, or an unknown pattern.
        RuntimeError: memory ran out.
    """
    if _is_for_eager(A.shape[-1], dt_proj_weight.shape[-1], u, projected, dt_proj_weight, dt_proj_bias, A, D):
        return eager.ss2d_scan(u, projected, dt_proj_weight, dt_proj_bias, A, D, pattern)
    y = torch.empty(u.shape, dtype=_image_dtype(u), device="cpu")
    problem, keep = _grid_problem(u, projected, dt_proj_weight, dt_proj_bias, A, D, pattern)
    if u.numel():
        problem.y = y.data_ptr()
        if problem.threads > 2 and problem.batch * _blocks(problem) < 2 * problem.threads:
            keep.append(route_y := _buffer(problem.routes, *u.shape))
            problem.route_y = route_y.data_ptr()
        _run_forward(problem)
    del keep
    return y.to(u.dtype)


def ss2d_scan_backward(
    grad_y: Tensor,
    u: Tensor,
    projected: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A: Tensor,
    D: Tensor,
    pattern: str,
) -> list[Tensor]:
    """Gradients of `ss2d_scan` for its six tensors, in order, from the inputs alone.

    States are computed again, a stretch of the sequence at a time, and never leave the cache.

    Raises:
        ValueError: a shape that does not fit, or an unknown pattern.
        RuntimeError: memory ran out.
    """
    inputs = (u, projected, dt_proj_weight, dt_proj_bias, A, D)
    if _is_for_eager(A.shape[-1], dt_proj_weight.shape[-1], grad_y, *inputs):
        return eager.ss2d_scan_backward(grad_y, *inputs, pattern)
    if not u.numel():
        return [torch.zeros_like(value, memory_format=torch.contiguous_format) for value in inputs]
    checks.shape("grad_y", grad_y, tuple(u.shape), "the shape of u, (B, H, W, D)")
    problem, keep = _grid_problem(*inputs, pattern)
    keep.append(grad := _dense(grad_y, _image_dtype(u)))
    problem.grad_y = grad.data_ptr()
    grad_u, grad_projected, weights = _run_backward(problem)
    grad_weight, grad_bias, grad_A, grad_D = _split_weights(problem, weights)
    results = (grad_u, grad_projected, grad_weight, grad_bias, grad_A, grad_D.expand(D.shape))
    return [as_result(value, like) for value, like in zip(results, inputs, strict=True)]


def _grid_problem(
    u: Tensor, projected: Tensor, dt_proj_weight: Tensor, dt_proj_bias: Tensor, A: Tensor, D: Tensor, pattern: str
) -> tuple[_Problem, list[Tensor]]:
    """What the kernel is told of an SS2D, and the tensors that must outlive the call."""
    routes = get_routes(pattern)
    checks.grid(u, projected, dt_proj_weight, dt_proj_bias, A, D, len(routes))
    (batch, height, width, channels), K = u.shape, len(routes)
    N, R = A.shape[2], dt_proj_weight.shape[2]
    image = _dense(u, _image_dtype(u))
    projected, weight, bias, A, D = (_dense(value) for value in (projected, dt_proj_weight, dt_proj_bias, A, D))
    bits = _route_bits(pattern)
    problem = _Problem(
        batch=batch, height=height, width=width, channels=channels, groups=1, states=N, rank=R, routes=K,
        pixel_stride=K * (R + 2 * N), route_stride=R + 2 * N, B_offset=R, C_offset=R + N, softplus=1,
        bfloat16=image.dtype == torch.bfloat16, route_bits=bits.data_ptr(), u=image.data_ptr(),
        dt_weight=weight.data_ptr(), dt_bias=bias.data_ptr(), A=A.data_ptr(), D=D.data_ptr(),
    )  # fmt: skip
    _complete(problem, projected)
    return problem, [image, projected, weight, bias, A, D]


@functools.cache
def _route_bits(pattern: str) -> Tensor:
    """A pattern's routes as the kernel knows them: 1 by columns, 2 backwards."""
    return torch.tensor(
        [route.columns + 2 * route.backwards for route in get_routes(pattern)], dtype=torch.int32, device="cpu"
    )


# --- one sequence ----------------------------------------------------------------------------------------------------


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Selective scan; arguments and results as in `reference.selective_scan`.

    Raises:
        ValueError: a shape that does not fit.
        RuntimeError: memory ran out.
    """
    arguments = (u, delta, A, B, C, D, z, delta_bias)
    if _is_for_eager(A.shape[-1], 1, *arguments):
        return eager.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    problem, keep = _sequence_problem(u, delta, A, B, C, D, delta_bias, delta_softplus)
    y, last = _sequence_forward(problem, keep)
    y = y.transpose(1, 2)
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(u.dtype).contiguous(), last


def selective_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """Gradients of `selective_scan` for u, delta, A, B, C and those of D, z and delta_bias that are given, in order.

    Raises:
        ValueError: a shape that does not fit.
        RuntimeError: memory ran out.
    """
    arguments = (u, delta, A, B, C, D, z, delta_bias)
    if _is_for_eager(A.shape[-1], 1, grad_y, grad_last, *arguments):
        return eager.selective_scan_backward(grad_y, grad_last, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    checks.shape("grad_y", grad_y, tuple(u.shape), "the shape of u, (batch, D, L)")
    checks.shape("grad_last", grad_last, (*u.shape[:2], A.shape[1]), "(batch, D, N)")
    if not u.numel():
        return [torch.zeros_like(v, memory_format=torch.contiguous_format) for v in arguments if v is not None]
    problem, keep = _sequence_problem(u, delta, A, B, C, D, delta_bias, delta_softplus)
    grad, grad_z = grad_y.float(), None
    if z is not None:
        y, _ = _sequence_forward(problem, keep)
        grad, grad_z = eager.gate_backward(grad, y.transpose(1, 2), z.float())
    keep += [grad := _dense(grad.transpose(1, 2)), last := _dense(grad_last)]
    grad_delta = _buffer(*grad.shape)
    problem.grad_y, problem.grad_last, problem.grad_delta = grad.data_ptr(), last.data_ptr(), grad_delta.data_ptr()
    grad_u, grad_parameters, weights = _run_backward(problem)
    _, grad_bias, grad_A, grad_D = _split_weights(problem, weights)
    batch, _, length = u.shape
    grad_B, grad_C = grad_parameters.view(batch, length, 2, *B.shape[1:3]).permute(2, 0, 3, 4, 1)
    results = (
        (grad_u.view(grad.shape).transpose(1, 2), u), (grad_delta.transpose(1, 2), delta), (grad_A, A),
        (grad_B, B), (grad_C, C), (grad_D, D), (grad_z, z), (grad_bias, delta_bias),
    )  # fmt: skip
    return [as_result(value, like) for value, like in results if value is not None and like is not None]


def _sequence_problem(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[_Problem, list[Tensor]]:  # fmt: skip
    """What the kernel is told of a sequence (a grid of one row, time before channels), and the tensors to keep."""
    checks.sequence(u, delta, A, B, C, D, delta_bias)
    (batch, channels, length), N, groups = u.shape, A.shape[1], B.shape[1]
    x, step = (_dense(value.transpose(1, 2)) for value in (u, delta))
    parameters = _buffer(batch, length, 2, groups, N)
    parameters[:, :, 0], parameters[:, :, 1] = B.permute(0, 3, 1, 2), C.permute(0, 3, 1, 2)
    keep = [x, step, parameters, _dense(A), torch.zeros(1, dtype=torch.int32, device="cpu")]
    problem = _Problem(
        batch=batch, height=1, width=length, channels=channels, groups=groups, states=N, rank=0, routes=1,
        pixel_stride=2 * groups * N, group_stride=N, B_offset=0, C_offset=groups * N, softplus=delta_softplus,
        u=x.data_ptr(), delta=step.data_ptr(), A=keep[3].data_ptr(), route_bits=keep[4].data_ptr(),
    )  # fmt: skip
    for field, vector in (("D", D), ("dt_bias", delta_bias)):
        if vector is not None:
            keep.append(_dense(vector))
            setattr(problem, field, keep[-1].data_ptr())
    _complete(problem, parameters)
    return problem, keep


def _sequence_forward(problem: _Problem, keep: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The ungated result (batch, L, D), and the last state (batch, D, N)."""
    y = _buffer(problem.batch, problem.width, problem.channels)
    last = _buffer(problem.batch, problem.channels, problem.states).zero_()
    if y.numel():
        problem.y, problem.last = y.data_ptr(), last.data_ptr()
        _run_forward(problem)
    return y, last


# --- both ------------------------------------------------------------------------------------------------------------


def _is_for_eager(states: int, rank: int, *tensors: Tensor | None) -> bool:
    return not states or not rank or state_dtype(*tensors) == torch.float64


def _image_dtype(u: Tensor) -> torch.dtype:
    return torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32


def _dense(value: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    if value.device.type != "cpu":
        raise ValueError(f"the native backend was given a tensor on {value.device}; it runs on the CPU only")
    return value.detach().to(dtype).contiguous()


def _buffer(*shape: int) -> Tensor:
    """Fresh memory, whatever dtype and device the user has made the default."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _complete(problem: _Problem, parameters: Tensor) -> None:
    begin = parameters.data_ptr()
    problem.dt_low = begin
    problem.B = begin + problem.B_offset * parameters.element_size()
    problem.C = begin + problem.C_offset * parameters.element_size()
    problem.threads = _threads(problem)


def _blocks(problem: _Problem) -> int:
    """Blocks of neighbouring channels; a block lies within one group."""
    return problem.groups * -(-(problem.channels // problem.groups) // _BLOCK)


def _threads(problem: _Problem) -> int:
    steps = problem.batch * problem.height * problem.width * problem.routes * _blocks(problem) * problem.states
    return torch.get_num_threads() if steps > _STEPS_FOR_THREADS else 1


def _run_forward(problem: _Problem) -> None:
    """Runs on as many tasks as make equal shares for the threads."""
    tasks = problem.batch * (problem.routes if problem.route_y else 1)
    problem.slots = min(_blocks(problem), problem.threads // math.gcd(tasks, problem.threads))
    _run("vmamba_forward", problem)


def _run(function: str, problem: _Problem) -> None:
    assert _LIBRARY is not None
    if getattr(_LIBRARY, function)(ctypes.byref(problem)):
        raise RuntimeError(f"{function}: out of memory for a scan of {problem.height}×{problem.width} positions")


def _run_backward(problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, of the parameters where those lie (flat), and of everything that has no batch (flat)."""
    batch, positions, channels = problem.batch, problem.height * problem.width, problem.channels
    problem.slots = min(_blocks(problem), -(-_BACKWARD_TASKS // batch))
    grad_u = _buffer(batch * positions * channels)
    grad_parameters = _buffer(problem.slots, batch * positions * problem.pixel_stride)
    weights = _buffer(batch, problem.routes * channels * (problem.rank + 1 + problem.states) + channels)
    problem.grad_u = grad_u.data_ptr()
    problem.grad_parameters, problem.grad_weights = grad_parameters.data_ptr(), weights.data_ptr()
    _run("vmamba_backward", problem)
    return grad_u, grad_parameters[0], weights[0]


def _split_weights(problem: _Problem, weights: Tensor) -> list[Tensor]:
    """Gradients of dt_weight, dt_bias, A and D (the last for all routes together), each flat."""
    per_route = problem.routes * problem.channels
    return list(weights.split([per_route * problem.rank, per_route, per_route * problem.states, problem.channels]))
