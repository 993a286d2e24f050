"""A model as a graph of torch's operators, for inputs of any size: what every format starts from."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from vmamba.errors import ExportError, first_line
from vmamba.files import shown, why_unwritable
from vmamba.models.checkpoints import default_metadata
from vmamba.nn import SS2D

_ENDINGS = (".onnx", ".pt2", ".safetensors", ".pth", ".pt", ".ckpt", ".bin")  # that say what is in a file


@dataclass(frozen=True)
class Images:
    """The inputs of a model.

    Attributes:
        chans: channels.
        height, width: what the model is meant for, or if any other will do, at most 224.
        smallest: the smallest side it takes.
        is_open: whether height and width are open in the graph; the batch always is.
    """

    chans: int
    height: int
    width: int
    smallest: int
    is_open: bool

    @classmethod
    def of(cls, model: nn.Module, is_open: bool) -> Images:
        """What a model of ours or of timm's says of itself; 3 channels and 224² where it says nothing."""
        told: Mapping[str, Any] = default_metadata(model)
        chans, *size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
        size = told.get("img_size") or size
        height, width = to_2tuple(size)
        if is_open:  # any size will do, and large ones take long
            height, width = min(height, 224), min(width, 224)
        smallest = getattr(model, "total_stride", None) or min(32, height, width)
        return cls(int(told.get("in_chans") or chans), int(height), int(width), int(smallest), is_open)

    def example(self) -> Tensor:
        """A batch to trace with: no two sides are equal, and none is 1, so that nothing is taken for a constant."""
        width = self.width + 3 * self.smallest if self.is_open else self.width
        return torch.zeros(2, self.chans, self.height + self.smallest * self.is_open, width)

    def trials(self, least: int | None = None) -> list[Tensor]:
        """Three batches to check a graph with: of the size the model is meant for, as small as may be, and odd."""
        least = least or self.smallest
        sizes = [(1, self.height, self.width), (2, self.height, self.width), (3, self.height, self.width)]
        if self.is_open:
            sizes[1:] = [(2, least, 2 * least), (1, self.height + 13, self.width // 2 + 32)]
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(batch, self.chans, *size, generator=generator) for batch, *size in sizes]

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """For `torch.export.export`."""
        return (dict.fromkeys((0, 2, 3) if self.is_open else (0,), torch.export.Dim.DYNAMIC),)


class AdaptiveAveragePool(nn.Module):
    """`torch.nn.AdaptiveAvgPool2d` as two products with averaging matrices, for graphs with open sizes."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.size = to_2tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, *size)."""
        for axis, cells in zip((2, 3), self.size, strict=True):
            if cells is not None:
                x = (x.transpose(axis, 3) @ _averaging(x, axis, cells)).transpose(axis, 3)
        return x


def _averaging(x: Tensor, axis: int, cells: int) -> Tensor:
    """(side, cells): cell i averages the pixels from ⌊i·side/cells⌋ to ⌈(i + 1)·side/cells⌉."""
    side = x.shape[axis]
    pixel, cell = torch.arange(side, device=x.device)[:, None], torch.arange(cells, device=x.device)
    start, end = cell * side // cells, ((cell + 1) * side + cells - 1) // cells
    return ((pixel >= start) & (pixel < end)).to(x.dtype) / (end - start).to(x.dtype)


def prepared(model: nn.Module, dtype: torch.dtype = torch.float32, detection: bool = False) -> nn.Module:
    """A copy to trace, in evaluation mode on the CPU, whose layers all have a form with open sizes.

    Args:
        model: to be copied.
        dtype: of the copy's parameters, but in float16 for the norms behind scans.
        detection: whether a model for detection is accepted, whose results are lists of any length.

    Raises:
        ExportError: it is one, and is not.
    """
    if getattr(model, "task", None) == "detection" and not detection:
        raise ExportError(
            f"{type(model).__name__} is a model for detection: what it does between its networks depends on what it"
            " finds, for which ONNX alone has a graph, in float32, float16 or int8. Classification, segmentation and"
            " feature extractors have others too."
        )
    with torch.no_grad(), _all_leaves(model):
        copied = copy.deepcopy(model).cpu().eval().requires_grad_(False).to(dtype)
    for module in list(copied.modules()):
        if isinstance(module, SS2D) and dtype == torch.float16:
            _scan_in_float32(module)
        for name, child in module.named_children():
            if type(child) is nn.AdaptiveAvgPool2d:
                setattr(module, name, AdaptiveAveragePool(child.output_size))
    return copied


@contextmanager
def _all_leaves(model: nn.Module) -> Iterator[None]:
    """Without the history of parameters that each pass computes, as of pruned layers: it cannot be copied."""
    computed = [
        (vars(module), name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    try:
        for attributes, name, value in computed:
            attributes[name] = value.detach()
        yield
    finally:
        for attributes, name, value in computed:
            attributes[name] = value


def _scan_in_float32(mixer: SS2D) -> None:
    """Keep float32 from the scans to the norm behind them: in a trained model their sum may be beyond float16."""
    mixer.conv.register_forward_hook(lambda layer, given, y: y.float())
    mixer.norm.float().register_forward_hook(lambda layer, given, y: y.half())


def traced(model: nn.Module, example: Tensor, images: Images) -> torch.export.ExportedProgram:
    """The graph of a prepared model.

    Raises:
        ExportError: torch cannot trace it, or only for one size.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The tensor attribute")  # of pruned layers, which each pass computes
            return torch.export.export(model, (example,), dynamic_shapes=images.dynamic_shapes(), strict=False)
    except ExportError:
        raise
    except Exception as error:  # whatever the model's own code raises, or torch says of it
        advice = "; a network that takes images of one size alone needs sizes='batch'" if images.is_open else ""
        said = first_line(error)
        raise ExportError(f"{type(model).__name__} cannot be written as a graph: {said}{advice}") from error


def traced_from_one(model: nn.Module, images: Images) -> tuple[torch.export.ExportedProgram, list[Tensor]]:
    """The graph of a prepared model for batches from one image on, and batches to check it with.

    Torch takes sizes of 1 for a special case: a graph is for batches of two images or more, and for coarsest grids of
    two pixels a side or more. It also has sizes without special cases, from 2.14 on, and they are taken where every
    layer can be traced with them, which those that pool cannot.

    Raises:
        ExportError: as of `traced`.
    """
    tracers = silenced("torch._subclasses.fake_tensor", "torch.fx.experimental")
    with suppress(Exception), tracers, redirect_stderr(io.StringIO()), torch.no_grad():
        from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapeVar, TensorSpec

        sides: list[Any] = [images.height, images.width]
        if images.is_open:
            sides = [ShapeVar(name, min=images.smallest) for name in ("height", "width")]
        (given,) = inspect.signature(model.forward).parameters
        shapes: Any = ParamsSpec({given: TensorSpec([ShapeVar("batch", min=1), images.chans, *sides])})
        program = torch.export.export(model, (images.example(),), dynamic_shapes=shapes, strict=False)
        _simplify_sizes(program)
        return program, images.trials()
    trials = [batch.expand(max(2, len(batch)), -1, -1, -1) for batch in images.trials(least=2 * images.smallest)]
    return traced(model, images.example(), images), trials


def _simplify_sizes(program: torch.export.ExportedProgram) -> None:
    """Say n instead of Max(1, n) in a graph's strides, where n is never less: torch is slow at reading them."""
    from torch.utils._sympy.functions import Max

    simple: dict[Any, Any] = {}

    def simplified(size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        node: Any = size.node
        env, given = node.shape_env, node.expr

        def larger(*values: Any) -> Any:
            (n, *more) = (value for value in values if value != 1)
            return Max(*values) if more or env.bound_sympy(n).lower < 1 else n

        if given not in simple:
            simple[given] = given.replace(Max, larger)
        return size if simple[given] == given else env.create_symintnode(simple[given], hint=None)

    def restrided(value: Any) -> Any:
        if not isinstance(value, FakeTensor) or not any(isinstance(step, torch.SymInt) for step in value.stride()):
            return value
        with value.fake_mode:
            return torch.empty_strided(
                value.shape, tuple(map(simplified, value.stride())), dtype=value.dtype, device=value.device
            )

    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if "val" in node.meta:
                node.meta["val"] = tree_map(restrided, node.meta["val"])


@contextmanager
def silenced(*names: str) -> Iterator[None]:
    """Without what these loggers say of their own steps, at length; errors that matter are raised."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def difference(found: Sequence[Any], expected: Sequence[Tensor]) -> float:
    """The largest difference of any output, as a share of that output's largest value."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        one, other = torch.as_tensor(one).double(), other.double()
        if one.shape != other.shape:
            raise ExportError(f"an output has shape {tuple(one.shape)}, and of the model {tuple(other.shape)}")
        share = (one - other).abs().max() / other.abs().max().clamp(min=1e-12)
        worst = max(worst, float(torch.nan_to_num(share, nan=float("inf"))))
    return worst


def outputs_of(result: Any) -> list[Tensor]:
    """The tensors that a model returned."""
    return [result] if isinstance(result, Tensor) else list(result)


def check_target(path: str | os.PathLike[str], ending: str, source: object = None) -> Path:
    """The path as one that a file can be written to, found out before the work is done.

    Args:
        path: of the file.
        ending: of the names of such files; those of other kinds of files are refused, other names are not.
        source: the file that it is made from, if it is.

    Raises:
        ExportError: it cannot, or would take the place of what it is made from.
    """
    target = Path(path)
    if reason := why_unwritable(target):
        raise ExportError(reason)
    if target.suffix.lower() in _ENDINGS and target.suffix.lower() != ending:
        raise ExportError(
            f"{shown(target)} would be taken for another kind of file; name it *{ending}, or choose a format"
        )
    is_path = isinstance(source, (str, os.PathLike)) and os.path.exists(source) and target.exists()
    if is_path and os.path.samefile(source, target):  # type: ignore[arg-type]
        raise ExportError(f"{shown(target)} is what the model is read from; give the new file another name")
    return target
