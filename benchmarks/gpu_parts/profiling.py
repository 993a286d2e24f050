"""Where the card's time goes in our model, kernel by kernel."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from measuring import kind_of
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_parts.bench import COMPILE_SECONDS, EAGER, EAGER_SECONDS, Bench, Part, failures_in, release
from gpu_parts.models import prepare, random_images
from gpu_parts.report import Row
from gpu_parts.yardsticks import MINE
from vmamba.nn import SS2D, VSSBlock

# The first kind whose words a kernel's name contains is its own. torch.compile names its kernels triton_poi (pointwise)
# or triton_per and triton_red (with sums), and then after all the layers that it fused.
KINDS = {
    "scan": ("vmamba::",),
    "copies": ("copy_kernel", "Memcpy", "Memset", "CatArray", "::copy_", "::_to_copy", "::clone"),
    "elementwise": ("triton_poi", "elementwise", "gelu", "silu"),
    "normalisation": ("triton_per", "triton_red", "norm", "Norm", "GammaBeta"),
    "convolutions": ("conv", "fprop", "dgrad", "wgrad", "nchw", "nhwc", "cudnn"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "gemv", "splitK", "::mm", "::addmm", "linear"),
    "sums": ("reduce", "softmax", "SoftMax"),
}
KERNELS_SHOWN = 20


def profiling(bench: Bench) -> Iterator[Part]:
    """Our model's kernels, and by kind beside the time in which the bytes they must move could be copied."""
    for training, mode in itertools.product((False, True), bench.settings.modes):
        name = "training" if training else "inference"
        bench.say(f"  {name}, {mode}")
        row: Row = {"pass": name, "mode": mode}
        kinds, kernels = [row], []
        with failures_in(row):
            bench.has_time_for(EAGER_SECONDS if mode == EAGER else COMPILE_SECONDS)
            kinds, kernels = profile_pass(bench, mode, training)
        yield "profile", [row | kind for kind in kinds]
        yield "kernels", [row | kernel for kernel in kernels]
        release()


def profile_pass(bench: Bench, mode: str, training: bool, rounds: int = 3) -> tuple[list[Row], list[Row]]:
    """Rows by kind and rows by kernel."""
    s = bench.settings
    torch._dynamo.reset()
    image, target = random_images(bench, s.batch, s.size)
    contender = prepare(bench, MINE, mode, s.size, training)
    call = partial(contender.step, image, target) if training else partial(contender.infer, image)
    call()
    call()
    on_card = bench.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * on_card)]
    with profile(activities=activities) as recorded:
        for _ in range(rounds):
            call()
        if on_card:
            torch.cuda.synchronize()
    words = KINDS | {"scan": (*KINDS["scan"], *our_kernels())}
    kinds: dict[str, float] = defaultdict(float)
    kernels = []
    for event in recorded.key_averages():
        if event.device_type != (DeviceType.CUDA if on_card else DeviceType.CPU) or event.is_user_annotation:
            continue
        microseconds = event.self_device_time_total if on_card else event.self_cpu_time_total
        kind, seconds = kind_of(event.key, words), microseconds / 1e6 / rounds
        kinds[kind] += seconds
        kernels.append({"kernel": event.key[:120], "kind": kind, "calls": event.count / rounds, "seconds": seconds})
    kernels.sort(key=lambda row: -row["seconds"])
    least = least_bytes(contender.model, replace(contender, forward=contender.model).infer, image, training)

    def summary(kind: str, seconds: float, moved: float) -> Row:
        floor = {"bytes": moved, "floor_seconds": moved / bench.copy_rate} if moved else {}
        return {"kind": kind, "seconds": seconds} | floor

    order = sorted(kinds | least, key=lambda kind: -kinds[kind])
    rows = [summary(kind, kinds[kind], least.get(kind, 0)) for kind in order]
    total = summary("all", sum(kinds.values()), sum(least.values()))
    return [*rows, total], kernels[:KERNELS_SHOWN]


def our_kernels() -> tuple[str, ...]:
    """Names of the Triton backend's kernels."""
    try:
        from triton.runtime import JITFunction

        from vmamba.ops.backends.triton import kernels
    except ImportError:
        return ()
    return tuple(name for name, value in vars(kernels).items() if isinstance(value, JITFunction))


def least_bytes(model: nn.Module, call: Callable[[Tensor], object], image: Tensor, training: bool) -> dict[str, float]:
    """Bytes that each kind of our model's layers must move: what goes in, what comes out and weights, two bytes each.

    In training also what the gradients need: a product's and a convolution's inputs, weights and gradients twice more,
    of the others the input and the gradients of input and output.
    """
    moved: dict[str, float] = defaultdict(float)

    def add(kind: str, forward: int, backward: int) -> None:
        moved[kind] += 2 * (forward + backward * training)

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        given = inputs[0].numel()
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            values = given + module.weight.numel() + output.numel()
            add("matrix products" if isinstance(module, nn.Linear) else "convolutions", values, 2 * values)
        elif isinstance(module, nn.LayerNorm):
            add("normalisation", 2 * given, 3 * given)
        elif isinstance(module, nn.GELU):
            add("elementwise", 2 * given, 3 * given)
        elif isinstance(module, VSSBlock):
            branches = 1 if module.mlp is None else 2
            add("elementwise", 3 * given * branches, 3 * given * branches)
        elif isinstance(module, SS2D):
            pixels = given // inputs[0].shape[-1]
            u, projected = pixels * module.D.shape[1], pixels * module.x_proj_weight.shape[:2].numel()
            values = u + module.x_proj_weight.numel() + projected
            add("elementwise", 2 * u, 3 * u)
            add("matrix products", values, 2 * values)
            add("scan", 2 * u + projected, 3 * u + 2 * projected)

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        call(image)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(moved)
