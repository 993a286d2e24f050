"""What each command does. What only one of them needs is imported there."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vmamba.cli.tables import Table, brief, contents, csv_text, flops, write
from vmamba.deploy.batch.config import BatchConfig
from vmamba.deploy.config import ExportConfig, QuantizeConfig, ShareConfig
from vmamba.errors import CheckpointError, ExportError, RecipeError
from vmamba.explain.config import ExplainConfig
from vmamba.files import shown, why_unwritable
from vmamba.tasks.recipe import (
    BaseTrainConfig,
    BaseValidateConfig,
    InfoConfig,
    ModelsConfig,
    PredictConfig,
    check_prediction,
)
from vmamba.tasks.runs import report

if TYPE_CHECKING:
    from vmamba.app import ExploreConfig
    from vmamba.models.registry import Entry


def train(config: BaseTrainConfig) -> int:
    """Train, and say where the run is."""
    from vmamba.tasks import training

    folder = training.train(config)
    if training.is_first_process():
        report(f"the run is in {folder}")
    return 0


def validate(config: BaseValidateConfig, given: Collection[str] = ()) -> int:
    """Measure, and print the figures."""
    from vmamba.tasks import training

    results = training.validate(config, given)
    if training.is_first_process():
        report(f"{results['weights']} on {results['data']}; pictures in {results['output']}")
        print(results["summary"])
    return 0


def predict(config: PredictConfig, paths: Sequence[str]) -> int:
    """Use a model on images, and print what it finds."""
    from rich.console import Console
    from rich.progress import track

    from vmamba.data.images import find_images
    from vmamba.tasks.prediction import load_predictor

    check_prediction(config)
    if config.output and (reason := why_unwritable(config.output)):
        raise OSError(reason)
    files, problems = find_images(paths)
    for problem in problems:
        report(problem)
    if not files:
        return 1
    predictor = load_predictor(config)
    report(f"predicting with {predictor.source}")
    console = Console(stderr=True)
    is_long = console.is_terminal and len(files) > config.batch_size
    outcomes = predictor.outcomes(files, config)
    results = list(track(outcomes, "predicting", total=len(files), console=console, disable=not is_long))
    for result in results:
        if result.error:
            report(result.error)
    if config.format == "json":
        write([record for result in results for record in result.records()], config.output)
    else:
        rows = [row for result in results for row in result.rows(exact=config.format == "csv")]
        header, right = predictor.outcome.columns, predictor.outcome.right
        write(csv_text(header, rows) if config.format == "csv" else Table(header, rows, right), config.output)
    return 1 if problems or any(result.error for result in results) else 0


def batch(config: BatchConfig, sources: Sequence[str]) -> int:
    """Use a model on very many images, and say where the results are."""
    from vmamba.deploy.batch.run import run_batch

    done = run_batch(sources, config)
    images, files = "image" + "s" * (done.images != 1), "file" + "s" * (done.parts != 1)
    report(f"{done.images:,} {images} in {done.parts:,} {files} in {shown(done.output)}")
    if done.computed:
        rate = done.computed / max(done.seconds, 1e-9)
        report(
            f"{done.computed:,} of them in {done.seconds:.1f} s, {rate:,.4g} a second; {done.bad:,} could not be used"
        )
    return 0


def explain(config: ExplainConfig, photos: Sequence[str]) -> int:
    """Look inside a model, and say where the figures are."""
    from vmamba.data.images import find_images
    from vmamba.explain import report as explaining

    files, problems = find_images(photos)
    for problem in problems:
        report(problem)
    if photos and not files:
        return 1
    failed = bool(problems)
    for step in explaining.explain(config, files):
        for figure in step.figures:
            print(figure, flush=True)
        if step.error:
            report(step.error)
            failed = True
    report(f"the numbers are in {shown(os.path.join(config.output, 'explain.json'))}")
    return int(failed)


def explore(config: ExploreConfig, checkpoints: Sequence[str], pretrained: Sequence[str], opens: bool) -> int:
    """Serve the page until an interrupt."""
    from vmamba.app.models import Catalogue
    from vmamba.app.page import Page, serve
    from vmamba.data.images import find_images

    catalogue = Catalogue(checkpoints, pretrained, config.runs)
    folders = filter(os.path.isdir, config.examples)
    examples = [picture for folder in folders for picture in find_images([folder])[0][:12]]
    serve(Page(catalogue, examples), config.host, config.port, opens)
    return 0


def export(config: ExportConfig, name: str) -> int:
    """Write a model for other programs, and say how near to the model it is."""
    from vmamba.deploy import export_aoti, export_onnx, export_torch
    from vmamba.deploy.graphs import check_target
    from vmamba.models.registry import open_model

    # Before anything is downloaded.
    check_target(config.output, ".onnx" if config.format == "onnx" else ".pt2", source=name)
    if (config.half and config.format != "onnx") or (config.embed and config.format == "torch"):
        raise ExportError("--half is for --format onnx, --embed for onnx and aoti; a torch program is as the model is")
    model, told = open_model(name, config.pretrained)
    names = told.get("class_names")
    options: dict[str, Any] = {"sizes": config.sizes, "tolerance": config.tolerance, "class_names": names}
    if config.format == "onnx":
        written = export_onnx(model, config.output, half=config.half, embed=config.embed, **options)
    elif config.format == "aoti":
        written = export_aoti(model, config.output, embed=config.embed, **options)
    else:
        written = export_torch(model, config.output, **options)
    size = f"{written.path.stat().st_size / 1e6:.1f} MB"
    nodes = f", {written.nodes} nodes" if written.nodes else ""
    report(f"{shown(written.path)}: {size}{nodes}, {written.seconds:.0f} s")
    for shape, share in written.differences.items():
        report(f"checked on {'×'.join(map(str, shape))}: differs from the model by {share:.1e} {written.unit}")
    if written.detections == 0:
        report("the model finds nothing in the noise that it was checked on: compare the file on pictures of your own")
    return 0


def quantize(config: QuantizeConfig, name: str, exclude: Sequence[str]) -> int:
    """Write a model in int8, and say how near to the float32 model it is."""
    from vmamba.deploy import quantize
    from vmamba.deploy.calibration import open_pictures

    options = asdict(config)
    output, data, dataset = (options.pop(setting) for setting in ("output", "data", "dataset"))
    # Of what has no torch program the model is at fault, whatever the data: `quantize` opens them once it knows.
    pictures = data if config.format == "torch" and not dataset else open_pictures(data, dataset)
    written = quantize(name, output, pictures, exclude=exclude, progress=True, **options)
    for problem in written.skipped:
        report(problem)
    size = written.path.stat().st_size
    report(f"{shown(written.path)}: {size / 1e6:.1f} MB, {written.layers} layers in int8, {written.seconds:.0f} s")
    alike = "" if written.agreement is None else f"; {written.agreement:.1%} of the decisions are the same"
    report(
        f"calibrated on {written.calibrated} images; on {written.checked} others it differs from the float32 model by"
        f" {written.mean:.1%} {written.unit}, and at most by {written.largest:.1%} of the largest{alike}"
    )
    return 0


def share(config: ShareConfig, name: str) -> int:
    """Write a model to a folder for others, and upload it if asked to."""
    from vmamba.deploy.share import share
    from vmamba.models.hub import push_to_hub

    remarks = share(
        name, config.output, license=config.license, data=config.data, repository=config.push, rgb=config.rgb
    )
    for remark in remarks:
        report(remark)
    report(f"the model is in {(folder := shown(config.output))}; vmamba.create_model reads it as 'local-dir:{folder}'")
    if config.push is not None:
        print(push_to_hub(config.output, config.push, private=config.private))
    return 0


def models(config: ModelsConfig) -> int:
    """List the models, task by task."""
    from vmamba.models.registry import ENTRIES

    found: list[dict[str, Any]] = []
    for entry in ENTRIES.values():
        params, operations = _cost(entry)
        row: dict[str, Any] = {"name": entry.name, "task": entry.task, "params": params, "gflops": operations}
        row |= {"img_size": list(entry.img_size), "top1": entry.published.get("top1")}
        found.append(row | {"published": dict(entry.published), "url": entry.url})
    if config.format == "json":
        write(found)
        return 0
    for task, data in {"classification": "ImageNet-1K", "segmentation": "ADE20K", "detection": "COCO"}.items():
        rows = [row for row in found if row["task"] == task]
        scores = list(dict.fromkeys(score for row in rows for score in row["published"]))
        header = [f"{task} model", "parameters", "FLOPs", "at", *(f"{data} {score}" for score in scores)]
        lines = []
        for row in rows:
            values = (f"{row['published'][score]:.1f} %" if row["published"] else "–" for score in scores)
            size = "×".join(map(str, row["img_size"]))
            lines.append((row["name"], f"{row['params'] / 1e6:.1f} M", flops(row["gflops"] * 1e9), size, *values))
        write(Table([title.replace("top1", "top-1") for title in header], lines, right=range(1, len(header))))
    return 0


def _cost(entry: Entry) -> tuple[int, float]:
    """Parameters, and multiply-accumulates in units of 1e9: as published, or else counted, now or before."""
    import torch

    from vmamba.models.complexity import COUNTED, profile

    if entry.params and entry.flops:
        return entry.params, entry.flops
    if entry.name in COUNTED:
        return COUNTED[entry.name]
    with torch.device("meta"):
        cost = profile(entry.build(), entry.img_size)
    return cost.params, cost.flops / 1e9


def info(config: InfoConfig, name: str) -> int:
    """Show a model's parts, and what is known about it."""
    from vmamba.models.complexity import profile

    model, about = _described(name)
    try:
        cost = profile(model, about["img_size"] if config.img_size is None else config.img_size)
    except ValueError as error:  # too small for its strides
        raise RecipeError(f"img_size is {config.img_size}: {error}") from error
    about |= {"img_size": list(cost.img_size), "params": cost.params, "flops": cost.flops}
    layers = [
        {
            "name": name,
            "type": type(module).__name__,
            "params": sum(p.numel() for p in module.parameters(recurse=False)),
        }
        for name, module in model.named_modules()
        if next(module.children(), None) is None or next(module.parameters(recurse=False), None) is not None
    ]
    if config.format == "json":
        write(about | {"parts": [asdict(part) for part in cost.parts]} | ({"layers": layers} if config.layers else {}))
        return 0
    write(Table(("", ""), [(k, brief(v)) for k, v in about.items() if k not in ("params", "flops")]))
    rows: list[tuple[Any, ...]] = [
        (part.name, contents(model.get_submodule(part.name)), "×".join(map(str, part.output_shape)),
         f"{part.params:,}", flops(part.flops)) for part in cost.parts
    ]  # fmt: skip
    rows.append(("total", "", "", f"{cost.params:,}", flops(cost.flops)))
    write(Table(("part", "layers", "output", "parameters", "FLOPs"), rows, right=(2, 3, 4)))
    if config.layers:
        rows = [(layer["name"], layer["type"], f"{layer['params']:,}") for layer in layers]
        write(Table(("layer", "type", "own parameters"), rows, right=(2,)))
    return 0


def _described(name: str) -> tuple[Any, dict[str, Any]]:
    """The model of a name, of a checkpoint file or of a folder, and what is known about it."""
    from vmamba.models.checkpoints import identify_checkpoint
    from vmamba.models.folders import source_of
    from vmamba.models.registry import ENTRIES, create_model, load_model
    from vmamba.models.variants import VARIANTS
    from vmamba.tasks.prediction import load_weights

    if entry := ENTRIES.get(name):
        about = {"model": name, "task": entry.task, "backbone": entry.backbone, **VARIANTS[entry.backbone].arguments()}
        about["img_size"] = entry.img_size
        about["release"] = {**entry.published, "url": entry.url} if entry.url else None
        return create_model(name), about
    if source_of(name):
        weights = load_weights(name)
        about = {"folder": shown(name), "task": weights.task}
        about |= {key: weights.metadata.get(key) for key in ("variant", "num_classes", "in_chans", "img_size")}
        return weights.model, about | {"metadata": weights.metadata}
    if not os.path.exists(name):
        raise CheckpointError(
            f"{shown(name)} is neither a variant nor a file or folder; `vmamba models` lists the variants"
        )
    found = identify_checkpoint(name)
    model, metadata = load_model(name)
    about = {
        "file": shown(name),
        "format": found.format,
        "task": found.task,
        "variant": found.metadata.get("variant") or found.variant,
        "num_classes": found.num_classes,
        "in_chans": found.in_chans,
        "weights": list(found.weights),
        "metadata": found.metadata,
        "img_size": metadata.get("img_size"),
    }
    return model, about
