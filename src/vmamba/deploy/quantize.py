"""Int8: a trained model whose matrix products and convolutions compute in 8 bits, calibrated on pictures."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vmamba.data.transforms import Preprocessing
from vmamba.deploy import programs
from vmamba.deploy.calibration import Calibration, Pictures, gather
from vmamba.deploy.detection import drift
from vmamba.deploy.export import export_onnx, graph_preprocessing, graph_task, metadata_of
from vmamba.deploy.graphs import Images, check_target, outputs_of, prepared, traced, traced_from_one
from vmamba.errors import DataError, ExportError, needing
from vmamba.files import replacing, shown
from vmamba.models.registry import open_model
from vmamba.ops.exporting import operators_kept

_Size = tuple[int, int] | None  # height and width that a graph takes alone; None of any
_Gather = Callable[[int, _Size, Preprocessing | None, str, bool], Calibration]  # the first by channels, the last if raw
_Run = Callable[[Tensor], Sequence[Any]]

TOLERANCE = 0.1
NOTE = "quantization"  # the entry of a file's metadata that says it is quantised


@dataclass(frozen=True)
class Quantized:
    """What was written.

    Attributes:
        path: the file.
        seconds: how long it took, checks included.
        layers: products and convolutions that compute in 8 bits.
        calibrated, checked: numbers of pictures.
        skipped: what could not be read, one message each.
        mean: difference from the float32 model on the pictures held back, root mean square, as a share of the outputs'.
            Of detections, those that only one of the two gives count with their score, others with the difference of
            the scores, and all that as a share of all scores.
        largest: the largest difference there, as a share of the largest output; of detections, of the largest score.
        agreement: share of decisions (of pictures, of their pixels, or of detections with a counterpart of the same
            label, whose box and mask overlap by half) that are the same; None of features.
        unit: what `mean` is a share of, and how.
    """

    path: Path
    seconds: float
    layers: int
    calibrated: int
    checked: int
    skipped: tuple[str, ...]
    mean: float
    largest: float
    agreement: float | None
    unit: str


def quantize(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    pictures: Pictures,
    *,
    format: Literal["onnx", "torch"] = "onnx",
    samples: int = 128,
    held_back: int = 128,
    exclude: Sequence[str] = (),
    embed: bool = False,
    sizes: Literal["open", "batch"] = "open",
    reduce_range: bool | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    tolerance: float = TOLERANCE,
    progress: bool = False,
) -> Quantized:
    """Write a model as a file that computes its matrix products and convolutions in int8, and check it.

    Nothing is trained: the ranges of the products' inputs are measured on pictures (uint8, one range a tensor), weights
    are rounded to int8, one scale for each output channel. The scans and their projections, normalisation,
    activations, depthwise convolutions and those that read the picture stay in float32, and of detectors the layers
    that give scores and boxes, and all that follows them. The file is compared with the float32 model on pictures that
    were held back, before it takes the place of what `path` held.

    Args:
        model: one that `export_onnx` takes; or a file: of weights, or ONNX in float32 as `export_onnx` writes it; or
            the name of a model with published weights.
        path: the file to write.
        pictures: like those that the model will meet; their answers are not needed. A folder, whose training split is
            taken if it has one, or a .tar file of class folders; or a list of files, folders, patterns, PIL
            images, and arrays, uint8 (H, W, 3) or (H, W); or a `vmamba.data.sources.Split`; or tensors that are ready
            for the network, float32 (C, H, W), of one size.
        format: "onnx", QDQ in standard operators of opset 20, or "torch", read back by `load_quantized`, which is not
            for detection.
        samples, held_back: how many pictures to calibrate and to check with, at most. They are drawn from all that
            there are; of fewer, a quarter is held back.
        exclude: patterns, as for file names, of layers that are to stay in float32: "head*", "stages.0.*".
        embed, sizes, class_names, preprocessing: of ONNX files, as for `export_onnx`; the last three of "torch" too.
        reduce_range: 7 bits for weights, so that processors without VNNI, which add up pairs of products in 16 bits, do
            not overflow; None for what this processor needs.
        tolerance: the largest difference from the float32 model that is accepted; see `Quantized.mean`.
        progress: show how far it is, if stderr is a terminal.

    Returns:
        What was written, with the differences found.

    Raises:
        ExportError: the model has no such graph, is quantised already, has no product to quantise, the path cannot be
            written to, or the file differs too much.
        DataError: fewer than eight pictures can be read, they do not fit the model, or a detector finds nothing there.
        CheckpointError: the file of weights cannot be read.
        ImportError: onnx, onnxscript, onnxruntime or, for "torch", torchao is missing.
    """
    start, target = time.perf_counter(), check_target(path, ".onnx" if format == "onnx" else ".pt2", source=model)
    if format == "torch" and embed:
        raise ExportError("embed is for ONNX; a torch program is the model as it is")
    if reduce_range is None:
        reduce_range = _overflows()
    source: Any = model
    if not isinstance(model, nn.Module):
        source, names = _opened(os.fspath(model))
        class_names = class_names or names
    if isinstance(source, Path) and (embed or sizes != "open"):
        raise ExportError(
            f"{shown(source)} has the inputs that it was exported with; give embed and sizes to the export"
        )
    if isinstance(source, nn.Module) and _is_quantised(source):
        raise ExportError(f"{type(source).__name__} is quantised already; give the float32 model")
    options: dict[str, Any] = {"sizes": sizes, "class_names": class_names, "preprocessing": preprocessing}

    def gathered(chans: int, only: _Size, told: Preprocessing | None, task: str, raw: bool) -> Calibration:
        fitted = task in ("segmentation", "detection")
        return gather(pictures, chans, told, samples, held_back, raw, progress, fitted, only)

    if format == "torch":
        if isinstance(source, Path):
            raise ExportError(
                f"{shown(source)} is an ONNX file, of which no torch program can be made; give the weights"
            )
        damage, calibration, layers = _write_torch(
            source, target, gathered, exclude, reduce_range, tolerance, **options
        )
    else:
        damage, calibration, layers = _write_onnx(
            source, target, gathered, exclude, reduce_range, tolerance, embed=embed, **options
        )
    return Quantized(
        target, time.perf_counter() - start, layers, len(calibration.seen), len(calibration.held_back),
        calibration.skipped, *damage,
    )  # fmt: skip


def load_quantized(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Read a torch program that `quantize` wrote, and what it says of itself.

    The program as it is rounds to 8 bits and computes in float32. It is fast once it is compiled, with weights as
    constants: set ``torch._inductor.config.freezing = True``, and call ``torch.compile(module)`` under `torch.no_grad`.
    A file that would have torch run anything but operators that compute, those of torch, torchvision and this package,
    is refused before torch sees it, as `torch.export.load` does not do.

    Returns:
        The program, which takes float32 batches as that of `export_torch` does; and its metadata, which has "model",
        "task", "vmamba_version", "class_names" and "preprocessing", as far as they are known, and "quantization".

    Raises:
        ExportError: it is no such file, or asks for more than such operators.
        ImportError: torchao is missing.
    """
    _int8_torch()  # brings the operators
    program, told = programs.read(path)
    return program.module(), {name: _parsed(text) for name, text in told.items()}


def _write_onnx(
    source: nn.Module | Path,
    target: Path,
    gathered: _Gather,
    exclude: Sequence[str],
    reduce_range: bool,
    tolerance: float,
    embed: bool,
    **options: Any,
) -> tuple[_Damage, Calibration, int]:
    with needing("deploy", "ONNX needs more packages"):
        from vmamba.deploy import int8_onnx, onnx_runtime
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(source, Path):
            whole = int8_onnx.read(source)
            told = int8_onnx.metadata(whole)
            task, pre = told.get("task", ""), options["preprocessing"]
            _, chans, only, raw = int8_onnx.input_of(whole)
            if pre is not None:
                told["preprocessing"] = json.dumps(pre.to_dict())
            elif "preprocessing" in told:
                pre = _preprocessing_in(source, told["preprocessing"])
            if options["class_names"]:
                told["class_names"] = json.dumps(list(options["class_names"]), ensure_ascii=False)
            int8_onnx.tell(whole, told)
            calibration = gathered(chans, only, pre, task, raw)
        else:
            images = Images.of(source, is_open=options["sizes"] == "open")
            pre, task = graph_preprocessing(source, images, options["preprocessing"]), graph_task(source)
            calibration = gathered(images.chans, _only(images), pre, task, embed)
            exported = export_onnx(source, Path(folder) / "whole.onnx", embed=embed, **options)
            whole = int8_onnx.read(exported.path)
        expected = onnx_runtime.runner(whole.SerializeToString())
    shown_batches = (batch.numpy() for batch in calibration.batches(calibration.seen, "calibrating"))
    note = NOTE, _note(len(calibration.seen), reduce_range)
    with replacing(target) as partial:
        layers = int8_onnx.write(whole, partial, shown_batches, exclude, reduce_range, note)
        found = onnx_runtime.runner(partial)
        damage = _damage(lambda batch: found(batch.numpy()), lambda batch: expected(batch.numpy()), calibration, task)
        _accept(damage, tolerance, target, len(calibration.held_back))
    return damage, calibration, layers


def _preprocessing_in(path: Path, text: str) -> Preprocessing:
    """What an ONNX file says of how pictures become its inputs.

    Raises:
        ExportError: nothing that can be read.
    """
    try:
        return Preprocessing.from_dict(json.loads(text))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ExportError(
            f'the "preprocessing" in {shown(path)} cannot be read: {error}. Give preprocessing=, or export it anew'
        ) from error


def _write_torch(
    source: nn.Module,
    target: Path,
    gathered: _Gather,
    exclude: Sequence[str],
    reduce_range: bool,
    tolerance: float,
    sizes: str,
    class_names: Sequence[str] | None,
    preprocessing: Preprocessing | None,
) -> tuple[_Damage, Calibration, int]:
    int8 = _int8_torch()
    images = Images.of(source, is_open=sizes == "open")
    told = graph_preprocessing(source, images, preprocessing)
    network, task = prepared(source), graph_task(source)
    calibration = gathered(images.chans, _only(images), told, task, False)
    with operators_kept():  # the scans, which inductor calls: written in torch's functions they take most time
        program = traced(network, images.example(), images)
    batches = calibration.batches(calibration.seen, "calibrating")
    module, layers = int8.quantised(program, batches, exclude, reduce_range)
    metadata = metadata_of(source, class_names, told) | {NOTE: _note(len(calibration.seen), reduce_range)}
    program, _ = traced_from_one(module, images)
    with replacing(target) as partial:
        programs.write(program, partial, metadata)
        written = programs.read(partial)[0].module()
        damage = _damage(
            lambda batch: outputs_of(written(batch)), lambda batch: outputs_of(network(batch)), calibration, task
        )
        _accept(damage, tolerance, target, len(calibration.held_back))
    return damage, calibration, layers


def _only(images: Images) -> _Size:
    return None if images.is_open else (images.height, images.width)


def _int8_torch() -> Any:
    with needing("int8", "int8 in torch needs one more package"):
        from vmamba.deploy import int8_torch
    return int8_torch


class _Damage(NamedTuple):
    """Differences: see `Quantized`."""

    mean: float
    largest: float
    agreement: float | None
    unit: str = "of the outputs (root mean square)"


def _damage(found: _Run, expected: _Run, calibration: Calibration, task: str) -> _Damage:
    """Compare two networks on the pictures held back."""
    if task == "detection":
        return _damage_of_detections(found, expected, calibration)
    squares, most, same = np.zeros(2), np.zeros(2), np.zeros(2)
    for batch in calibration.batches(calibration.held_back, "checking"):
        with torch.no_grad():
            one, other = ([np.asarray(value) for value in run(batch)] for run in (found, expected))
        for mine, theirs in zip(one, other, strict=True):
            if not np.issubdtype(theirs.dtype, np.floating):
                continue
            error = mine.astype(np.float64) - theirs
            squares += np.square(error).sum(), np.square(theirs, dtype=np.float64).sum()
            most = np.maximum(most, (np.abs(error).max(), np.abs(theirs).max()))
            if task in ("classification", "segmentation"):
                decisions = mine.argmax(1) == theirs.argmax(1)
                same += decisions.sum(), decisions.size
    mean = float(np.sqrt(squares[0] / max(squares[1], 1e-24)))
    return _Damage(mean, float(most[0] / max(most[1], 1e-12)), float(same[0] / same[1]) if same[1] else None)


def _damage_of_detections(found: _Run, expected: _Run, calibration: Calibration) -> _Damage:
    counts, scores, paired, wanted = [], [], 0, 0
    for batch in calibration.batches(calibration.held_back, "checking"):
        theirs = expected(batch)
        wanted += len(theirs[0])
        apart, score, pairs = drift(found(batch), theirs)
        counts.append(apart)
        scores.append(score)
        paired += pairs
    if not wanted:
        raise DataError(
            f"in {len(calibration.held_back)} pictures held back the float32 model finds nothing, so that nothing can"
            " be compared; give pictures that show what it is to find"
        )
    apart, score = torch.cat(counts), torch.cat(scores)
    mean, largest = float(apart.sum() / score.sum()), float(apart.max() / score.max())
    return _Damage(mean, largest, paired / len(apart), "of the detections, by score")


def _accept(damage: _Damage, tolerance: float, target: Path, pictures: int) -> None:
    if damage.mean <= tolerance:
        return
    alike = "" if damage.agreement is None else f", and {damage.agreement:.1%} of the decisions are the same"
    raise ExportError(
        f"{shown(target)} was not written: on {pictures} pictures held back it differs from the float32 model by"
        f" {damage.mean:.1%} {damage.unit}{alike}; {tolerance:.1%} is accepted. Calibrate with more"
        " pictures, like those that the model will meet, keep layers in float32 (exclude), or accept more (tolerance)"
    )


def _is_quantised(model: nn.Module) -> bool:
    """Whether it is, or holds, a graph that rounds."""
    graphs = (module.graph for module in model.modules() if isinstance(module, torch.fx.GraphModule))
    return any("quantize" in str(node.target) for graph in graphs for node in graph.nodes)


def _opened(name: str) -> tuple[nn.Module | Path, list[str] | None]:
    """A model by its name or file with the names of its classes; an ONNX file as it is."""
    if name.lower().endswith(".onnx"):
        if not os.path.isfile(name):
            raise ExportError(f"{shown(name)}: no such file")
        return Path(name), None
    if name.lower().endswith(".pt2"):
        raise ExportError(
            f"{shown(name)} is a torch program, which is finished; give the file of weights it was made from"
        )
    model, metadata = open_model(name)
    return model, metadata.get("class_names")


def _note(pictures: int, reduce_range: bool) -> str:
    """What the file says of itself."""
    told = {"weights": "int8", "activations": "uint8", "reduced_range": reduce_range, "calibrated_on": pictures}
    return json.dumps(told)


def _parsed(text: str) -> Any:
    return json.loads(text) if text[:1] in "[{" else text


def _overflows() -> bool:
    """Whether this processor adds up pairs of int8 products in 16 bits: x86 without VNNI."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return is_x86 and not torch.cpu._is_vnni_supported()
