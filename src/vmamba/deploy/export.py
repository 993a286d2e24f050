"""Writing a model as an ONNX file or as a torch.export program, checked against the model before it takes its name."""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vmamba import __version__
from vmamba.data.transforms import Preprocessing
from vmamba.deploy import programs
from vmamba.deploy.detection import OUTPUTS, DetectionGraph, in_rows, unmatched
from vmamba.deploy.graphs import (
    Images,
    check_target,
    difference,
    outputs_of,
    prepared,
    silenced,
    traced,
    traced_from_one,
)
from vmamba.errors import ExportError, needing
from vmamba.files import replacing, shown
from vmamba.models.checkpoints import default_metadata, per_channel
from vmamba.models.detection import MaskRCNN
from vmamba.ops.exporting import operators_kept
from vmamba.tasks.detector import sides_of
from vmamba.tasks.inference import filled_up
from vmamba.tasks.prediction import class_names

OPSET = 20
TOLERANCE, _TOLERANCE_HALF = 1e-4, 2e-2  # of the largest output
_UNMATCHED, _UNMATCHED_HALF = 2e-2, 1e-1  # of the detections
_FOLDED = 2**28  # bytes of a constant that may be computed while exporting: every weight there is


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        seconds: how long it took, checks included.
        differences: for the shape of each batch it was checked with, the largest difference from the model, as a share
            of the output's largest value.
        nodes: of an ONNX file, those of its graph and of the graphs inside.
        unit: what the differences are shares of.
        detections: of a detector, how many the model found in those batches, which are noise.
    """

    path: Path
    seconds: float
    differences: dict[tuple[int, ...], float]
    nodes: int | None = None
    unit: str = "of the largest output"
    detections: int | None = None


class Network(nn.Module):
    """A model between float32 inputs and outputs, whatever it computes in."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """(B, C, H, W) to the model's outputs."""
        y = self.model(images.to(self.dtype))
        if isinstance(y, Tensor):
            return y.float()
        if not isinstance(y, (list, tuple)) or not all(isinstance(value, Tensor) for value in y):
            name = type(self.model).__name__
            raise ExportError(f"{name} gives a {type(y).__name__}; expected a tensor, or a list or tuple of tensors")
        return [value.float() for value in y]


class _Rows(nn.Module):
    """A model for detection, whose results are put together as those of its graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) to the outputs of `DetectionGraph`."""
        return in_rows(self.model(filled_up(images), sizes=[images.shape[2:]] * len(images)))


class _Decision(nn.Module):
    """Normalisation, the network, and the most probable class, unless the network has decided by itself."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing, decides: bool = False) -> None:
        super().__init__()
        self.network, self.decides = network, decides
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(-1, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(-1, 1, 1) * 255)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> Any:
        """uint8 (B, C, H, W) to labels (B,) or (B, H, W), int64, and the probabilities of all classes."""
        found = self.network((images.float() - self.mean) / self.std)
        return found if self.decides else (found.argmax(1), found.softmax(1))


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    half: bool = False,
    embed: bool = False,
    sizes: Literal["open", "batch"] = "open",
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write a model as an ONNX file of standard operators, opset 20.

    The file is checked in ONNX Runtime, with three batches of other sizes, before it takes the place of what `path`
    held. Its metadata has, as plain text, "model", "task", "vmamba_version", and as JSON "class_names" and
    "preprocessing" (size, mean, standard deviation, interpolation, share of the centre crop).

    A model for detection is written with all that it does behind its network. The outputs are those of the whole batch,
    by picture and falling score: "boxes" (n, 4) in pixels, "scores" (n,), "labels" (n,), int64, "picture" (n,), int64,
    which of the batch, and of a model with masks "masks" (n, H, W), bool.

    Args:
        model: any of ours or timm's, changed as you like.
        path: the file to write.
        half: weights and layers in float16. Inputs, outputs, the scans with the norm behind them, and all that
            detection does between and behind its heads stay float32.
        embed: put the normalisation before the network and the decision behind it. The file then takes "images", uint8
            (B, C, H, W) in RGB, of the size the network is to see, and gives "labels", int64 (B,) or (B, H, W), and
            "probabilities" (B, classes, ...). Without it, it takes normalised float32 and gives "logits".
        sizes: "open" for any batch, height and width, or "batch" for networks that take images of one size alone.
        class_names: by default those that the model has, or else ImageNet's if they are 1000, or else numbers.
        preprocessing: by default the model's.
        tolerance: the largest difference that is accepted, as a share of the largest output; 1e-4, or 2e-2 with `half`.
            For detection, the share of detections that may have no counterpart: 2e-2, or 0.1 with `half`, where a
            counterpart's score may differ by 1e-2, not 1e-3, its box overlap by 95 %, not 99, and its mask by 90 %,
            not 95.

    Returns:
        What was written, with the differences found.

    Raises:
        ExportError: the model has no such graph, the path cannot be written to, or the file computes something else.
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    start, target = time.perf_counter(), check_target(path, ".onnx")
    with needing("deploy", "ONNX needs more packages"):
        import onnxscript.optimizer

        from vmamba.deploy import onnx_detection, onnx_runtime, onnx_scans
    detects = isinstance(model, MaskRCNN)
    limits = (_UNMATCHED, _UNMATCHED_HALF) if detects else (TOLERANCE, _TOLERANCE_HALF)
    limit = limits[half] if tolerance is None else tolerance
    images = Images.of(model, is_open=sizes == "open")
    told, whole = graph_preprocessing(model, images, preprocessing), prepared(model, detection=detects)
    reference, inputs = surrounded(model, _Rows(whole) if detects else Network(whole, torch.float32), told, embed)
    dtype = torch.float16 if half else torch.float32
    copied = prepared(model, dtype, detection=detects) if half else whole
    graph = DetectionGraph(copied, dtype) if isinstance(copied, MaskRCNN) else Network(copied, dtype)
    network, _ = surrounded(model, graph, told, embed)

    with operators_kept():
        program = traced(network, inputs(images.example()), images)
    table = onnx_scans.translations() | onnx_detection.translations()
    with silenced("torch.onnx", "onnxscript", "onnx_ir"):
        written = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, verbose=False, custom_translation_table=table
        )
        assert written is not None
        onnxscript.optimizer.optimize_ir(written.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    with torch.no_grad():
        count = len(outputs_of(reference(inputs(images.trials()[1]))))
    if detects:
        names = list(OUTPUTS[:count])
    else:
        names = ["labels", "probabilities"] if embed else ["logits"] if gives_logits(model) else _numbered(count)
    _name_values(written.model, names, images)
    written.model.metadata_props.update(metadata_of(model, class_names, told))
    for node in written.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # it names this machine's files

    def runner(file: Path) -> Callable[[Tensor], list[Any]]:
        run = onnx_runtime.runner(file)
        return lambda batch: run(batch.numpy())[first:]

    found: list[int] = []

    def expected(batch: Tensor) -> list[Tensor]:
        wanted = outputs_of(reference(batch))[first:]
        found.append(len(wanted[0]))
        return wanted

    first = 1 if embed and not detects else 0  # where two classes are almost equal, rounding decides the label
    compare: Callable[..., float] = difference
    if detects:
        compare = functools.partial(unmatched, score=1e-2, box=0.95, mask=0.9) if half else unmatched
    unit = "of the detections" if detects else Exported.unit
    with replacing(target) as partial:
        written.save(partial, external_data=False)
        batches = map(inputs, images.trials())
        differences = checked(runner(partial), expected, batches, limit, target, compare, unit)
    nodes = sum(1 for _ in written.model.graph.all_nodes())
    return Exported(target, time.perf_counter() - start, differences, nodes, unit, sum(found) if detects else None)


def surrounded(
    model: nn.Module, network: nn.Module, preprocessing: Preprocessing | None, embed: bool
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A network and how it is given normalised images; with `embed`, between pictures in uint8 and decisions.

    Raises:
        ExportError: nothing can be put around the model.
    """
    if not embed:
        return network, lambda batch: batch
    if preprocessing is None or not gives_logits(model):
        raise ExportError(
            f"{type(model).__name__} gives no logits of classes, or takes no pictures, so nothing can be put around it;"
            " leave out embed"
        )
    if getattr(model, "num_classes", None) == 1 and getattr(model, "task", None) != "detection":
        raise ExportError("the model has one output, among which there is nothing to decide; leave out embed")
    around = _Decision(network, preprocessing, decides=getattr(model, "task", None) == "detection")
    return around, lambda batch: (batch * 50 + 128).clamp(0, 255).to(torch.uint8)


def export_torch(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    sizes: Literal["open", "batch"] = "open",
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write a model as a `torch.export.ExportedProgram`, read back by `torch.export.load(path).module()`.

    Reading it needs torch alone. It takes float32 batches of normalised images. Written by torch before 2.14, or of a
    network that pools, as ResNet does, it is for two images or more, and for coarsest grids of two pixels a side or
    more, since torch takes one for a special case. Its extra file "metadata.json" has what an ONNX file's metadata has.
    Arguments, result and errors as of `export_onnx`.
    """
    start, target = time.perf_counter(), check_target(path, ".pt2")
    images = Images.of(model, is_open=sizes == "open")
    network = Network(prepared(model), torch.float32)
    program, trials = traced_from_one(network, images)
    metadata = metadata_of(model, class_names, graph_preprocessing(model, images, preprocessing))
    with replacing(target) as partial:
        programs.write(program, partial, metadata)
        with partial.open("rb") as file:
            module = torch.export.load(file).module()
        limit = TOLERANCE if tolerance is None else tolerance
        differences = checked(
            lambda batch: outputs_of(module(batch)),
            lambda batch: outputs_of(network(batch)),
            iter(trials),
            limit,
            target,
        )
    return Exported(target, time.perf_counter() - start, differences)


def checked(
    run: Callable[[Tensor], Sequence[Any]],
    expected: Callable[[Tensor], list[Tensor]],
    batches: Iterator[Tensor],
    limit: float,
    target: Path,
    compare: Callable[[Sequence[Any], Sequence[Tensor]], float] = difference,
    unit: str = Exported.unit,
) -> dict[tuple[int, ...], float]:
    """The differences at every batch; an error if one is too large, or the file does not run."""
    found = {}
    for batch in batches:
        with torch.no_grad():
            wanted = expected(batch)
            try:
                got = run(batch)
            except Exception as error:  # what the other program says of its file
                raise ExportError(
                    f"{shown(target)} was not written: its graph does not run on {tuple(batch.shape)}: {error}"
                ) from error
        found[tuple(batch.shape)] = share = compare(got, wanted)
        if not share <= limit:
            raise ExportError(
                f"{shown(target)} was not written: on {tuple(batch.shape)} it differs from the model by {share:.1e}"
                f" {unit}, and {limit:.1e} is accepted (tolerance)"
            )
    return found


def gives_logits(model: nn.Module) -> bool:
    """Whether a model's output is the logits of classes."""
    return bool(getattr(model, "num_classes", 0)) and not hasattr(getattr(model, "feature_info", None), "out_indices")


def graph_task(model: nn.Module) -> str:
    """What a model is for, and "features" if it gives no decisions."""
    return str(default_metadata(model).get("task") or "classification" if gives_logits(model) else "features")


def _numbered(count: int) -> list[str]:
    return ["features"] if count == 1 else [f"features_{i}" for i in range(count)]


def graph_preprocessing(model: nn.Module, images: Images, given: Preprocessing | None) -> Preprocessing | None:
    """How pictures become the model's inputs; None where they are not pictures."""
    if given is not None or images.chans not in (1, 3):
        return given
    told = {"mean": Preprocessing.mean, "std": Preprocessing.std} | default_metadata(model)
    if isinstance(model, MaskRCNN):
        told["img_size"] = sides_of(model)
    statistics = {name: per_channel(told[name], images.chans) for name in ("mean", "std")}
    return Preprocessing.from_dict(told | {"in_chans": images.chans} | statistics)


def metadata_of(model: nn.Module, names: Sequence[str] | None, preprocessing: Preprocessing | None) -> dict[str, str]:
    """What every format says of a model, as plain text or JSON; see `export_onnx`.

    Raises:
        ExportError: more or fewer names than classes.
    """
    told = default_metadata(model)
    classes = told.get("num_classes")
    if names and classes and len(names) != classes:
        raise ExportError(f"{len(names)} names of classes were given; the model has {classes} classes")
    found = {
        "model": str(told.get("variant") or type(model).__name__),
        "task": graph_task(model),
        "vmamba_version": __version__,
    }
    if found["task"] != "features":
        found["class_names"] = json.dumps(
            class_names(names or told.get("class_names") or [], model), ensure_ascii=False
        )
    if preprocessing is not None:
        found["preprocessing"] = json.dumps(preprocessing.to_dict())
    return found


def _name_values(model: Any, outputs: Sequence[str], images: Images) -> None:
    """Give inputs, outputs and their open sides names that people read."""
    (given,) = model.graph.inputs
    symbols = {str(given.shape[axis]): name for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    symbols = {symbol: name for symbol, name in symbols.items() if not symbol.isdigit()}
    given.name = "images"
    for value in (given, *model.graph.outputs):
        for axis, side in enumerate(value.shape or ()):
            if not isinstance(side, int):
                value.shape[axis] = re.sub(r"\bs\d+\b", lambda match: symbols.get(match[0], match[0]), str(side))
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
