"""The command ``vmamba``: parses and calls, decides nothing. What only one subcommand needs is imported there."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from vmamba.data.images import find_images
from vmamba.errors import CheckpointError, DataError, ImageError, NonFiniteError, RecipeError
from vmamba.files import atomic_write
from vmamba.tasks.recipe import InfoConfig, ModelsConfig, PredictConfig, TrainConfig, ValidateConfig
from vmamba.tasks.runs import report

Config = TypeVar("Config")

# Errors that are for the person at the keyboard: their message says it all, a traceback would bury it.
_EXPECTED = (CheckpointError, DataError, ImageError, ImportError, NonFiniteError, RecipeError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if all went well; 1 if something could not be done, which is then told on stderr. Wrong usage exits with 2.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    name = arguments.subcommand
    command, config_type = _COMMANDS[name]
    given: Namespace = parser.instantiate(arguments)[name]
    config = config_type(**{field.name: given[field.name] for field in fields(config_type)})
    try:
        return command(config, given)
    except _EXPECTED as error:
        # From a loader's worker the message arrives inside the worker's traceback.
        message = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        report(f"vmamba {name}: {message}")
        return 1
    except KeyboardInterrupt:
        report(f"vmamba {name}: stopped")
        return 130


def make_parser() -> ArgumentParser:
    """The parser of the command line and of YAML files."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="vmamba",
        description="Train, test and use visual state space models. 'vmamba COMMAND --help' explains each command.",
    )
    commands = parser.add_subcommands(metavar="COMMAND")

    train = ArgumentParser(
        usage="vmamba train [--config FILE] [--SETTING VALUE ...]",
        description="Train an image classifier, or go on training one. Settings come from YAML files and from flags; "
        "later ones win. The run's folder gets config.yaml, metrics.csv, learning_curve.png, checkpoints/last.ckpt and "
        "model.safetensors. Examples: 'vmamba train --config configs/imagenet/vmamba_tiny_s1l8.yaml --data.root "
        "/data/imagenet'; the same command under torchrun or srun uses many devices; with '--resume true' it goes on "
        "with a run that was interrupted.",
    )
    _configurable(train, TrainConfig)
    commands.add_subcommand("train", train, help="train a classifier")

    validate = ArgumentParser(
        usage="vmamba validate [--config FILE] [--SETTING VALUE ...]",
        description="Measure a classifier on images with known classes: accuracy, confusion matrix, sample predictions."
        " Without arguments: the model of the newest run, on the images it was validated on during training.",
    )
    _configurable(validate, ValidateConfig)
    commands.add_subcommand("validate", validate, help="measure a classifier on images with known classes")

    predict = ArgumentParser(
        usage="vmamba predict PATH [PATH ...] [--SETTING VALUE ...]",
        description="Classify images. A file that cannot be read is reported on stderr, the others are classified all "
        "the same, and the exit status is then 1. Examples: 'vmamba predict photo.jpg'; 'vmamba predict photos/ "
        "--pretrained vmamba_tiny_s1l8 --format csv --output classes.csv'.",
    )
    predict.add_argument("paths", nargs="+", help="image files, folders (searched for images), or quoted patterns")
    _configurable(predict, PredictConfig)
    commands.add_subcommand("predict", predict, help="classify image files")

    models = ArgumentParser(
        usage="vmamba models [--SETTING VALUE ...]",
        description="List the models with parameters, FLOPs (multiply-accumulates) and accuracy.",
    )
    _configurable(models, ModelsConfig)
    commands.add_subcommand("models", models, help="list the models")

    info = ArgumentParser(
        usage="vmamba info MODEL [--SETTING VALUE ...]",
        description="Show a model's parts, their output shapes, parameters and FLOPs (multiply-accumulates), and what "
        "a checkpoint file holds.",
    )
    info.add_argument("model", help="a variant's name, or a checkpoint file")
    _configurable(info, InfoConfig)
    commands.add_subcommand("info", info, help="show one model or checkpoint file")
    return parser


class _ConfigFile(ActionConfigFile):
    """A YAML file with settings; ``base: OTHER.yaml`` in it names a file, relative to it, whose settings come first."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        settings = yaml.safe_load(Path(values).read_text()) if os.path.isfile(values) else None
        if isinstance(settings, dict) and (base := settings.pop("base", None)):
            self(parser, cfg, str(Path(values).parent / base))
            values = yaml.safe_dump(settings)
        super().__call__(parser, cfg, values, option_string)


def _configurable(parser: ArgumentParser, config: type) -> None:
    parser.add_argument("--config", action=_ConfigFile, help="YAML file with settings; may be given several times")
    parser.add_class_arguments(config, None)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def _train(config: TrainConfig, given: Namespace) -> int:
    from vmamba.tasks.classification import is_first_process, train

    folder = train(config)
    if is_first_process():
        report(f"the run is in {folder}")
    return 0


def _validate(config: ValidateConfig, given: Namespace) -> int:
    from vmamba.tasks.classification import is_first_process, validate

    results = validate(config)
    if is_first_process():
        report(f"{results['weights']} on {results['data']}; pictures in {results['output']}")
        top5 = f", top-5 {results['top5']:.2%}" if "top5" in results else ""
        print(f"{results['images']} images: top-1 {results['top1']:.2%}{top5}, loss {results['loss']:.4f}")
    return 0


def _predict(config: PredictConfig, given: Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    from vmamba.data.config import DataConfig
    from vmamba.tasks.prediction import Classifier, default_device

    files, problems = find_images(given.paths)
    for problem in problems:
        report(problem)
    if not files:
        return 1
    data = DataConfig(img_size=config.img_size)
    classifier = Classifier.load(config.checkpoint, config.pretrained, config.ema, data)
    try:
        classifier.model.to(default_device() if config.device == "auto" else config.device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {config.device!r} cannot be used: {error}") from error
    report(f"classifying with {classifier.source}")
    console = Console(stderr=True)
    shown = console.is_terminal and len(files) > config.batch_size
    found = classifier.predict(files, config.topk, config.batch_size, config.workers)
    results = list(track(found, "classifying", total=len(files), console=console, disable=not shown))
    for result in results:
        if result.error:
            report(result.error)

    rows = [
        (result.file if rank == 1 or config.format == "csv" else "", rank, score.name, score.index, score.confidence)
        for result in results
        for rank, score in enumerate(result.classes, start=1)
    ]
    header = ("file", "rank", "class", "index", "confidence")
    if config.format == "json":
        _write([{k: v for k, v in asdict(r).items() if v} for r in results], config.output)
    elif config.format == "csv":
        _write(_csv(header, [(*row[:4], f"{row[4]:.6f}") for row in rows]), config.output)
    else:
        _write(Table(header, [(*row[:4], f"{row[4]:.2%}") for row in rows], right=(1, 3, 4)), config.output)
    return 1 if problems or any(result.error for result in results) else 0


def _models(config: ModelsConfig, given: Namespace) -> int:
    from vmamba.models.complexity import profile
    from vmamba.models.variants import VARIANTS
    from vmamba.models.vmamba import create_model

    models: list[dict[str, Any]] = []
    lines = []
    for name, variant in VARIANTS.items():
        if variant.release:
            params, flops = variant.release.params, variant.release.flops
        else:
            model: Any = create_model(name)
            cost = profile(model, variant.img_size)
            params, flops = cost.params, cost.flops / 1e9
        top1, url = (variant.release.top1, variant.release.url) if variant.release else (None, None)
        size = list(variant.img_size)
        models.append({"name": name, "params": params, "gflops": flops, "img_size": size, "top1": top1, "url": url})
        accuracy = "–" if top1 is None else f"{top1:.1f} %"
        lines.append((name, f"{params / 1e6:.1f} M", _flops(flops * 1e9), f"{size[0]}×{size[1]}", accuracy))
    if config.format == "json":
        _write(models)
    else:
        _write(Table(("model", "parameters", "FLOPs", "at", "ImageNet-1K top-1"), lines, right=(1, 2, 3, 4)))
    return 0


def _info(config: InfoConfig, given: Namespace) -> int:
    from vmamba.models.complexity import profile

    model, about = _described(given.model)
    cost = profile(model, config.img_size)
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
        _write(about | {"parts": [asdict(part) for part in cost.parts]} | ({"layers": layers} if config.layers else {}))
        return 0
    _write(Table(("", ""), [(k, _brief(v)) for k, v in about.items() if k not in ("params", "flops")]))
    rows: list[tuple[Any, ...]] = [
        (part.name, _contents(model.get_submodule(part.name)), "×".join(map(str, part.output_shape)),
         f"{part.params:,}", _flops(part.flops)) for part in cost.parts
    ]  # fmt: skip
    rows.append(("total", "", "", f"{cost.params:,}", _flops(cost.flops)))
    _write(Table(("part", "layers", "output H×W×C", "parameters", "FLOPs"), rows, right=(2, 3, 4)))
    if config.layers:
        rows = [(layer["name"], layer["type"], f"{layer['params']:,}") for layer in layers]
        _write(Table(("layer", "type", "own parameters"), rows, right=(2,)))
    return 0


def _described(name: str) -> tuple[Any, dict[str, Any]]:
    """The model of a variant or of a checkpoint file, and what is known about it."""
    from vmamba.models.checkpoints import identify_checkpoint, load_model
    from vmamba.models.variants import VARIANTS
    from vmamba.models.vmamba import create_model

    if name in VARIANTS:
        about = {"model": name, **asdict(VARIANTS[name])}
        if release := VARIANTS[name].release:
            about["release"] = {"top1": release.top1, "url": release.url}
        return create_model(name), about
    if not os.path.exists(name):
        raise CheckpointError(f"{name!r} is neither a variant nor a file. Variants: {', '.join(VARIANTS)}")
    found = identify_checkpoint(name)
    about = {
        "file": name,
        "format": found.format,
        "variant": found.metadata.get("variant") or found.variant,
        "num_classes": found.num_classes,
        "in_chans": found.in_chans,
        "weights": list(found.weights),
        "metadata": found.metadata,
    }
    return load_model(name)[0], about


_COMMANDS: dict[str, tuple[Callable[[Any, Namespace], int], type]] = {
    "train": (_train, TrainConfig),
    "validate": (_validate, ValidateConfig),
    "predict": (_predict, PredictConfig),
    "models": (_models, ModelsConfig),
    "info": (_info, InfoConfig),
}


# ---------------------------------------------------------------------------------------------------------------------
# Printing


class Table:
    """Rows of text: drawn with lines on a terminal, in plain aligned columns elsewhere."""

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> None:
        self.header, self.rows, self.right = header, [[str(cell) for cell in row] for row in rows], right

    def __str__(self) -> str:
        lines = [list(self.header)] * any(self.header) + self.rows
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column in self.right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def draw(self) -> None:
        """Print to the terminal."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(box=box.SIMPLE_HEAD, show_header=any(self.header))
        for column, title in enumerate(self.header):
            table.add_column(title, justify="right" if column in self.right else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        Console(highlight=False, markup=False).print(table)


def _write(result: Any, path: str | None = None) -> None:
    """Print a result: tables and texts as they are, anything else as JSON."""
    if isinstance(result, Table) and path is None and sys.stdout.isatty():
        result.draw()
        return
    text = str(result) if isinstance(result, str | Table) else json.dumps(result, indent=2, ensure_ascii=False)
    if path is None:
        print(text)
        return
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _brief(value: Any) -> str:
    """One line that shows a setting or metadata."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_brief(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_brief, value[:12])) + (f" … ({len(value)})" if len(value) > 12 else "")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flops(number: float) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _contents(module: Any) -> str:
    """The kinds of layer in a part, in order; repeated ones counted."""
    blocks = getattr(module, "blocks", None)
    if blocks is not None and len(blocks):
        before = [type(child).__name__ for name, child in module.named_children() if name != "blocks"]
        before = [name for name in before if name != "Identity"]
        return ", ".join([*before, f"{len(blocks)} × {type(blocks[0]).__name__}"])
    return ", ".join(type(child).__name__ for child in module.children()) or type(module).__name__


if __name__ == "__main__":
    sys.exit(main())
