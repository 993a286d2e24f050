"""Proof that the Triton kernels compute on a card what the eager backend computes, before they are chosen there.

The first time that a dtype and a pattern meet a card, both backends compute a few small scans, forward and backward;
and for the pattern "cross" a depthwise convolution, LayerNorm and, in half precision, a product with GELU and a stem,
whose kernels are chosen with that pattern's. This happens in processes of their own, which a compiler that crashes or a
kernel that writes where it must not takes down alone. The verdict stays in the user's cache directory, until the
kernels, Triton, torch or the driver change; that there was no memory, or no process to be had, says nothing of the
kernels and is not kept.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from vmamba.errors import first_line
from vmamba.files import atomic_write
from vmamba.ops.arguments import ScanArguments, SS2DArguments
from vmamba.ops.backends import eager, triton
from vmamba.ops.routes import SEQUENCE, get_routes

_PATIENCE = 600  # seconds for one proof, most of which goes into compiling
# Height, width, channels, states and rank. Blocks of 64 and of 32 channels, and in the second some that are not full,
# where a thread takes one channel at a time; columns of three.
_GRIDS = ((7, 7, 64, 1, 20), (11, 13, 40, 3, 3), (17, 19, 96, 1, 6), (3, 4, 32, 1, 2))
_CONVOLVED = (1, 8, 9, 32)  # the image of the convolution: more than one tile each way, whatever the tile
_STEM = ((2, 3, 19, 22), (48, 3, 3, 3), (48,), (48,), (48,))  # and of these, with the norm's scale and offset
_MULTIPLIED = (96, 128, 192)  # channels, for each length of a step in each tile that is chosen by them
_NORMALISED, _EPS = (50, 96), 1e-5  # several blocks of rows, the last of which is not full
# What CUDA, cuBLAS, cuDNN and Triton say of a card that is full, or another process's own.
_FOR_NOW = re.compile("busy or unavailable|out of memory|ALLOC_FAILED|NOT_INITIALIZED|unable to find an engine")
_PROGRAM = "import sys; from vmamba.ops.backends import proving; proving.main(*sys.argv[1:])"
_NO_GRID = "selective_scan"
# SIGHUP, SIGINT, SIGKILL and SIGTERM: from a user, or the system where memory is short, and not from a kernel's fault.
_FROM_OUTSIDE = (1, 2, 9, 15)
_verdicts: dict[tuple[torch.device, torch.dtype, str | None], bool] = {}


class _Verdict(NamedTuple):
    """What is wrong with the kernels, "" if nothing; and whether it would be the same another time."""

    fault: str
    lasts: bool = True


@torch.compiler.assume_constant_result  # tracers: a compiled graph is made after a proof, never with the proof inside
def is_proven(device: torch.device, dtype: torch.dtype, pattern: str | None) -> bool:
    """Whether the Triton kernels are known to be right; finds it out where it is not known yet.

    Args:
        device: a GPU that Triton runs on.
        dtype: of the image; float64 is never proven, since eager computes it.
        pattern: of a grid's routes along rows and columns; None for `selective_scan`.

    Returns:
        False also while a CUDA graph is captured, if nothing is known yet; that is asked again later.
    """
    key = device, dtype, pattern
    if dtype == torch.float64 or triton.unavailable(device) is not None:
        return False
    if key not in _verdicts:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        _verdicts[key] = _look_up_or_prove(device, dtype, pattern)
    return _verdicts[key]


def _look_up_or_prove(device: torch.device, dtype: torch.dtype, pattern: str | None) -> bool:
    about = {**_circumstances(device), "dtype": str(dtype).removeprefix("torch."), "pattern": pattern or _NO_GRID}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    file = cache_folder() / f"{name}.json"
    with ExitStack() as stack:
        with suppress(OSError):  # where nothing can be written, each process proves it for itself
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{file}.lock", timeout=_PATIENCE))  # another process may be at it
        fault, lasts = _read(file), True
        if fault is None:
            fault, lasts = _prove(device, about)
            if lasts:
                with suppress(OSError), atomic_write(file) as verdict:
                    verdict.write(json.dumps(about | {"fault": fault}, indent=1).encode())
    if fault:
        kept = f"The verdict is kept in {file}: delete it to try again. " if lasts else "The next process tries again. "
        warnings.warn(
            f"the Triton kernels are not used for {about['dtype']} and {about['pattern']} on {about['card']}: "
            f"{fault}. The eager backend computes instead, correct but slow. Please report this with the versions "
            f"({', '.join(f'{key} {about[key]}' for key in ('triton', 'torch', 'driver'))}). "
            f"{kept}"
            'vmamba.use_backend("triton") uses the kernels all the same',
            stacklevel=2,
        )
    return not fault


def cache_folder() -> Path:
    """Where verdicts are kept: `$XDG_CACHE_HOME/vmamba/proofs`, by default in `~/.cache`."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        cache = Path(os.devnull)  # below which nothing can be written
    return cache / "vmamba" / "proofs"


def _read(file: Path) -> str | None:
    """What a file says is wrong with the kernels, "" if nothing; None if it says nothing."""
    try:
        fault = json.loads(file.read_text())["fault"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fault if isinstance(fault, str) else None


@functools.cache
def _circumstances(device: torch.device) -> dict[str, Any]:
    """All that a verdict depends on, beside dtype and pattern."""
    import triton as compiler

    code = hashlib.sha256()
    for file in sorted(Path(triton.__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    about = {"kernels": code.hexdigest()[:16], "triton": compiler.__version__, "torch": torch.__version__}
    if device.type != "cuda":
        return about | {"card": f"{platform.machine()}, interpreted", "driver": "none"}
    properties = torch.cuda.get_device_properties(device)
    return about | {"card": f"{properties.name} ({properties.major}.{properties.minor})", "driver": _driver()}


def _driver() -> str:
    """The driver's version, as far as it can be known."""
    for place in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        try:
            return Path(place).read_text().splitlines()[0]
        except (OSError, IndexError):
            continue
    return str(torch.version.hip or torch.version.cuda)


# --- the proof -------------------------------------------------------------------------------------------------------


def _prove(device: torch.device, about: dict[str, Any]) -> _Verdict:
    """Found out in processes of their own, side by side, since most of the time is the compiler's."""
    if sys.stderr is not None and sys.stderr.isatty():
        what = f"{about['dtype']}, {about['pattern']}"
        print(f"vmamba: trying the Triton kernels on {about['card']} ({what}), once", file=sys.stderr, flush=True)
    arguments = [str(device), about["dtype"], about["pattern"]]
    count = _processes()
    verdict = _prove_side_by_side(arguments, count)
    if count > 1 and not verdict.lasts:  # there may be room for one
        verdict = _prove_side_by_side(arguments, 1)
    return verdict


def _processes() -> int:
    """In how many a proof is shared out: a scan by one plan each, if there are as many cores."""
    return min(os.cpu_count() or 1, 3 * len(_GRIDS))


def _prove_side_by_side(arguments: Sequence[str], count: int) -> _Verdict:
    deadline, verdict = time.monotonic() + _PATIENCE, _Verdict("")
    with ExitStack() as stack:
        try:
            shares = [stack.enter_context(_started(*arguments, str(i), str(count))) for i in range(count)]
        except OSError as error:
            return _Verdict(f"no process could be started for the comparison ({error})", lasts=False)
        for process in shares:
            found = _verdict_of(process, deadline)
            if found.fault and found.lasts:
                return found
            verdict = verdict if verdict.fault else found
    return verdict


@contextmanager
def _started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of the proof, which does not outlive the block."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments], env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def _verdict_of(process: subprocess.Popen[str], deadline: float) -> _Verdict:
    try:
        output, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return _Verdict(f"the comparison did not end in {_PATIENCE} seconds")
    try:
        told = json.loads(output.splitlines()[-1])
        verdict = _Verdict(told["fault"], told["lasts"])
        assert isinstance(verdict.fault, str)
    except (IndexError, ValueError, KeyError, TypeError, AssertionError):
        last = (errors.strip().splitlines() or ["it printed nothing"])[-1]
        status = process.returncode
        how = f"was ended by signal {-status}" if status < 0 else f"failed ({status})"
        return _Verdict(f"the comparison {how}: {last}", lasts=-status not in _FROM_OUTSIDE)
    return verdict


def compare(device: torch.device, dtype: torch.dtype, pattern: str, share: int = 0, shares: int = 1) -> str:
    """How the Triton backend's values and gradients differ from the eager one's in float64; "" if they do not.

    They may by rounding: relative to the largest number of each result, 1e-4 for the values and 1e-3 for gradients, or
    four units in the last place of the dtype.
    """
    rounding = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    # Scans as small as these would have short segments only.
    plans: tuple[triton.Plan, ...] = ("short", "long", "walk")
    scans = itertools.product(_problems(device, dtype, pattern), plans)
    for arguments, plan in itertools.islice(scans, share, None, shares):
        name = "ss2d_scan" if isinstance(arguments, SS2DArguments) else "selective_scan"
        exact = type(arguments)._make(v.double() if isinstance(v, Tensor) else v for v in arguments)
        expected = _as_tuple(getattr(eager, name)(exact))
        with triton.use_plan(plan):
            found = _as_tuple(getattr(triton, name)(arguments))
        grads = [torch.randn_like(value) for value in found]
        if plan != "walk":  # which is for the way forwards alone
            expected += getattr(eager, f"{name}_backward")(*(grad.double() for grad in grads), exact)
            with triton.use_plan(plan):
                found += getattr(triton, f"{name}_backward")(*grads, arguments)
        values = ["y", "the last state"][: len(grads)]
        labels = [*values, *(f"the gradient of {field}" for field in arguments._fields)]
        for label, value, reference in zip(labels, found, expected, strict=False):
            if not reference.numel():
                continue
            apart = _distance(value, reference)
            if not apart <= max(1e-4 if label in values else 1e-3, rounding):  # NaN is not
                where = f"{tuple(arguments.u.shape)}, by the plan {plan!r}"
                return f"{label} is off by {apart:.1e} of its largest value, in {where}"
    # Layers ask for "cross" (`vmamba.ops.layers`). The last share has the fewest scans.
    if pattern != "cross" or share != shares - 1:
        return ""
    return (
        _compare_convolution(device, dtype, rounding)
        or _compare_normalisation(device, dtype, rounding)
        or _compare_products(device, dtype, rounding)
    )


def _compare_convolution(device: torch.device, dtype: torch.dtype, rounding: float) -> str:
    """The same of the depthwise convolution with SiLU, by the largest and the smallest tile."""
    from vmamba.ops.backends.triton import convolution

    torch.manual_seed(0)
    x, grad = (torch.randn(_CONVOLVED, device=device).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(_CONVOLVED[-1], *shape, device=device) for shape in ((1, 3, 3), ()))
    exact = image, filters, offset = [value.double().requires_grad_() for value in (x, weight, bias)]
    with torch.enable_grad():
        z = F.conv2d(image.permute(0, 3, 1, 2), filters, offset, padding=1, groups=len(filters))
        y = F.silu(z.permute(0, 2, 3, 1))
    expected = y.detach(), *torch.autograd.grad(y, exact, grad.double())
    for tile in (convolution.TILES[0], convolution.TILES[-1]):
        with convolution.use_tiles(tile):
            found = (
                convolution.depthwise_silu(x, weight, bias),
                *convolution.depthwise_silu_backward(grad, x, weight, bias),
            )
        if fault := _fault_of_layer("the convolution", found, expected, rounding):
            return f"{fault}, with {tile}"
    z = F.conv2d(image.permute(0, 3, 1, 2), filters, padding=1, groups=len(filters))
    y, without = F.silu(z.permute(0, 2, 3, 1)).detach(), convolution.depthwise_silu(x, weight, None)
    return _fault_of_layer("the convolution without a bias", [without], [y], rounding)


def _compare_normalisation(device: torch.device, dtype: torch.dtype, rounding: float) -> str:
    """The same of LayerNorm, from and to that dtype and float32, which meet under autocast."""
    from vmamba.ops.backends.triton import normalisation

    torch.manual_seed(0)
    values, grads, (weight, bias) = (
        torch.randn(*shape, device=device) for shape in (_NORMALISED, _NORMALISED, (2, 96))
    )
    for given, wanted in dict.fromkeys(itertools.product((dtype, torch.float32), repeat=2)):
        x, grad = values.to(given), grads.to(wanted)
        exact = rows, scale, offset = [value.double().requires_grad_() for value in (x, weight, bias)]
        with torch.enable_grad():
            y = F.layer_norm(rows, scale.shape, scale, offset, _EPS)
        expected = y.detach(), *torch.autograd.grad(y, exact, grad.double())
        found = (
            normalisation.layer_norm(x, weight, bias, _EPS, wanted),
            *normalisation.layer_norm_backward(grad, x, weight, bias, _EPS),
        )
        if fault := _fault_of_layer("LayerNorm", found, expected, rounding):
            return f"{fault}, from {given} to {wanted}"
    return ""


def _compare_products(device: torch.device, dtype: torch.dtype, rounding: float) -> str:
    """The same of a product with GELU and of a stem's first half, which there are in half precision."""
    if dtype == torch.float32 or (dtype == torch.bfloat16 and device.type == "cpu"):  # the interpreter's is wrong
        return ""
    from vmamba.ops.backends.triton import linear, stem

    torch.manual_seed(0)
    for depth in _MULTIPLIED:
        shapes = (150, depth), (200, depth), (200,)  # two blocks each way that are not full
        x, weight, bias = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
        expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
        fault = _fault_of_layer("the product with GELU", [linear.linear_gelu(x, weight, bias)], [expected], rounding)
        if fault:
            return f"{fault}, with {depth} channels"
    x, weight, bias, scale, offset = (torch.randn(shape, device=device).to(dtype) for shape in _STEM)
    y = F.conv2d(x.double(), weight.double(), bias.double(), stride=2, padding=1).permute(0, 2, 3, 1)
    expected = F.gelu(F.layer_norm(y, scale.shape, scale.double(), offset.double(), _EPS))
    found = stem.stem(x, weight, bias, scale, offset, 2, _EPS)
    return _fault_of_layer("the stem", [found], [expected], rounding)


def _fault_of_layer(layer: str, found: Sequence[Tensor], expected: Sequence[Tensor], rounding: float) -> str:
    """What is off of a layer's result and, if given, its gradients for x, weight and bias; "" if nothing is."""
    labels = ("the result", "the gradient of x", "the gradient of the weight", "the gradient of the bias")
    for label, value, reference in zip(labels[: len(found)], found, expected, strict=True):
        apart = _distance(value, reference)
        if not apart <= max(1e-4, rounding):  # NaN is not
            return f"{label} of {layer} is off by {apart:.1e} of its largest value"
    return ""


def _distance(value: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return ((value.double() - reference).abs().max() / reference.abs().max()).item()


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _problems(device: torch.device, dtype: torch.dtype, pattern: str) -> Iterator[SS2DArguments | ScanArguments]:
    torch.manual_seed(0)
    normal = functools.partial(torch.randn, device=device)
    K = 1 if pattern == _NO_GRID else len(get_routes(pattern))
    for height, width, channels, N, R in _GRIDS:
        A = -torch.rand(K, channels, N, device=device) - 0.1
        if pattern != _NO_GRID:
            shape = (2, 1, height * width) if pattern == SEQUENCE else (2, height, width)
            u, projected = normal(*shape, channels), normal(*shape, K, R + 2 * N)
            if dtype == torch.bfloat16:  # as `ss2d_scan` has it on a GPU
                projected = projected.to(dtype)
            weight, bias = normal(K, channels, R) * R**-0.5, normal(K, channels) - 3
            yield SS2DArguments(u.to(dtype), projected, weight, bias, A, normal(K, channels), pattern)
        else:
            shape = (2, channels, height * width)
            u, delta, z = (normal(*shape).to(dtype) for _ in range(3))
            B, C = (normal(2, 2, N, height * width) for _ in range(2))
            yield ScanArguments(u, delta, A[0], B, C, normal(channels), z, normal(channels) - 3, True)


def main(device: str, dtype: str, pattern: str, share: str = "0", shares: str = "1") -> None:
    """Compare a share of the scans, and print the verdict as a line of JSON."""
    lasts = True
    try:
        fault = compare(torch.device(device), getattr(torch, dtype), pattern, int(share), int(shares))
    except Exception as error:
        fault = f"{type(error).__name__}: {first_line(error)}"
        lasts = not (isinstance(error, torch.OutOfMemoryError | MemoryError) or _FOR_NOW.search(fault))
    print(json.dumps({"fault": fault, "lasts": lasts}), flush=True)
