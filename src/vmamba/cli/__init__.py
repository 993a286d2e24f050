"""The command ``vmamba``: parses and calls, decides nothing."""

from __future__ import annotations

import io
import os
import re
import sys
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from vmamba import __version__
from vmamba.app import ExploreConfig
from vmamba.cli import commands
from vmamba.deploy.batch.config import BatchConfig
from vmamba.deploy.config import ExportConfig, QuantizeConfig, ShareConfig
from vmamba.errors import VmambaError
from vmamba.explain.config import ExplainConfig
from vmamba.files import shown
from vmamba.tasks import settings_of
from vmamba.tasks.recipe import InfoConfig, ModelsConfig, PredictConfig, TrainConfig, ValidateConfig, load_recipe
from vmamba.tasks.runs import report


@dataclass(frozen=True)
class Command:
    """What the parser has to know of a command. What it does is the function of its name in `vmamba.cli.commands`.

    Attributes:
        config: its settings, of which each is a flag.
        help: what it does, in a few words.
        description: the same at length.
        usage: how it is called, after its name.
        arguments: what is given without a flag, or with one of an unusual kind: arguments of `add_argument` by name.
    """

    config: type
    help: str
    description: str
    usage: str = "[--config FILE] [--SETTING VALUE ...]"
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)


_OTHER_TASKS = (
    " What follows is for one task; '--task segmentation --help', '--task detection --help' and '--task classification "
    "--help' show the settings of each."
)
_MODEL = "a checkpoint file, a folder of `vmamba share`, local-dir:FOLDER or hf-hub:OWNER/NAME"

COMMANDS = {
    "train": Command(
        TrainConfig,
        "train a model",
        "Train a model, or go on training one. Settings come from YAML files and from flags; later ones win. The run's "
        "folder gets config.yaml, metrics.csv, learning_curve.png, checkpoints/last.ckpt and model.safetensors. "
        "Examples: 'vmamba train --config configs/imagenet/vmamba_tiny_s1l8.yaml --data.root /data/imagenet'; the same "
        "command under torchrun or srun uses many devices; with '--resume true' it goes on with a run that was "
        "interrupted." + _OTHER_TASKS,
    ),
    "validate": Command(
        ValidateConfig,
        "measure a model on images with known answers",
        "Measure a model on images with known answers; pictures show where it is right and wrong. Without arguments: "
        "the model of the newest run, on the images it was validated on during training." + _OTHER_TASKS,
    ),
    "predict": Command(
        PredictConfig,
        "use a model on image files",
        "Use a model on images. A file that cannot be read is reported on stderr, the others are done all the same, "
        "and the exit status is then 1. Examples: 'vmamba predict photo.jpg'; 'vmamba predict photos/ --pretrained "
        "vmamba_tiny_s1l8 --format csv --output classes.csv'.",
        "PATH [PATH ...] [--SETTING VALUE ...]",
        {"paths": {"nargs": "+", "help": "image files, folders (searched for images), or quoted patterns"}},
    ),
    "batch": Command(
        BatchConfig,
        "use a model on very many images, on one machine or a cluster",
        "Use a model on as many images as there are, with a worker on every core or GPU of this machine or of a Ray "
        "cluster. The results are Parquet files. An image that cannot be used is a row that says why. A job that was "
        "stopped goes on where it was when the same command is given again. Examples: 'vmamba batch photos/ "
        "shards/*.tar --output results'; 'vmamba batch s3://bucket/images.parquet --output s3://bucket/results "
        "--address auto'.",
        "SOURCE [SOURCE ...] --output DEST [--SETTING VALUE ...]",
        {
            "sources": {
                "nargs": "+",
                "help": "images, .tar files of images, Parquet files with a column of images or of their paths, "
                "folders of these, quoted patterns; also as addresses (s3://, gs://, ...)",
            }
        },
    ),
    "explain": Command(
        ExplainConfig,
        "see what a model sees",
        "Show what happens inside a model: the maps of its stages, what a patch is made of along each of the four "
        "routes, how long patches are remembered, what made the answer. Writes figures, and their numbers into "
        "explain.json. Examples: 'vmamba explain photo.jpg --query 120,80'; 'vmamba explain photo.jpg --pretrained "
        "vmamba_tiny_s1l8 --what activation,matrix --block 6'; 'vmamba explain --what depth --labelled flowers'.",
        "[PHOTO ...] [--SETTING VALUE ...]",
        {
            "photos": {
                "nargs": "*",
                "default": [],
                "help": "image files, folders (searched for images), or quoted patterns; depth, scaling, accuracy and "
                "patterns need none",
            }
        },
    ),
    "explore": Command(
        ExploreConfig,
        "look inside a model on a web page",
        "Serve a page on this machine that shows what happens inside a model: what each patch hears along each of the "
        "four routes, stage maps, predictions. It needs no network, and leaves no files. Examples: 'vmamba explore'; "
        "'vmamba explore --checkpoint a.safetensors b.pth --port 8000 --no-open'.",
        "[--checkpoint FILE ...] [--pretrained NAME ...] [--no-open] [--SETTING VALUE ...]",
        {
            "--checkpoint": {"nargs": "+", "default": [], "metavar": "FILE", "help": "models to offer first"},
            "--pretrained": {
                "nargs": "+",
                "default": [],
                "metavar": "NAME",
                "help": "models whose published weights to offer, downloaded if need be; those in the cache are anyway",
            },
            "--open": {"action": BooleanOptionalAction, "default": True, "help": "whether to open it in the browser"},
        },
    ),
    "export": Command(
        ExportConfig,
        "write a model as a file that other programs run",
        "Write a model for ONNX Runtime, OpenVINO and others, or, not for detection, as a torch.export program or a "
        "compiled package; the file is checked against the model first. Examples: 'vmamba export "
        "runs/demo/model.safetensors --output model.onnx'; 'vmamba export vmamba_tiny_s1l8 --output tiny.onnx --half "
        "true'.",
        "MODEL --output FILE [--SETTING VALUE ...]",
        {"model": {"help": f"a name that `vmamba models` lists, for its published weights; or {_MODEL}"}},
    ),
    "quantize": Command(
        QuantizeConfig,
        "write a model in int8, calibrated on images",
        "Write a model of any task whose matrix products and convolutions compute in 8 bits, as an ONNX file or, not "
        "for detection, a program for torch: smaller (VMamba-T a quarter of the size in ONNX, a third in torch), and "
        "faster on the CPU. Nothing is trained; ranges are measured on some images, and the file is compared with the "
        "float32 model on others. Examples: 'vmamba quantize model.safetensors --output int8.onnx --data flowers'; "
        '\'vmamba quantize model.onnx --output int8.onnx --data photos/ --exclude "head*" "stages.0.*"\'.',
        "MODEL --output FILE --data IMAGES [--SETTING VALUE ...]",
        {
            "model": {
                "help": f"{_MODEL}; a float32 ONNX file of `vmamba export`; or a name that `vmamba models` lists, for "
                "its published weights"
            },
            "--exclude": {
                "nargs": "+",
                "default": [],
                "metavar": "LAYER",
                "help": "patterns of layers that stay in float32",
            },
        },
    ),
    "share": Command(
        ShareConfig,
        "write a model to a folder for others, with a card",
        "Write a model of any task to a folder that timm, transformers and vmamba.create_model read, with a card that "
        "tells its data, results and recipe as far as its run's files know them, and upload it if asked to. Examples: "
        "'vmamba share runs/demo/model.safetensors --output garments --license mit'; the same with '--push "
        "OWNER/garments' after 'hf auth login'.",
        "MODEL --output FOLDER [--SETTING VALUE ...]",
        {"model": {"help": "a checkpoint file"}},
    ),
    "models": Command(
        ModelsConfig,
        "list the models",
        "List the models of each task with parameters, FLOPs (multiply-accumulates) and published scores.",
        "[--SETTING VALUE ...]",
    ),
    "info": Command(
        InfoConfig,
        "show one model or checkpoint file",
        "Show a model's parts, their output shapes, parameters and FLOPs (multiply-accumulates), and what a checkpoint "
        "file holds.",
        "MODEL [--SETTING VALUE ...]",
        {"model": {"help": f"a name that `vmamba models` lists; or {_MODEL}"}},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if all went well; 1 if something could not be done, which is then told on stderr; 130 after an interrupt from
        the keyboard; 141 when nobody reads the output any more. Wrong usage exits with 2.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal's encoding does not have
    argv = sys.argv[1:] if argv is None else argv
    name = next((word for word in argv if word in COMMANDS), "")
    try:
        return _run(argv, name)
    except (VmambaError, ImportError) as error:
        # From a loader's worker the message arrives inside the worker's traceback.
        report(f"vmamba {name}: {str(error).rsplit(f'{type(error).__name__}: ', 1)[-1].strip()}")
        return 1
    except BrokenPipeError:
        return 141
    except OSError as error:
        report(f"vmamba {name}: {f'{shown(error.filename)}: {error.strerror}' if error.filename else error}")
        return 1
    except KeyboardInterrupt:
        report(f"vmamba {name}: stopped")
        return 130
    finally:
        _flush(name)


def _run(argv: Sequence[str], name: str) -> int:
    settings = settings_of(name, argv) if name in ("train", "validate") else None  # each task has its own
    parser = make_parser(name, settings)
    given: Namespace = parser.instantiate(parser.parse_args(argv))[name]
    command = COMMANDS[name]
    settings = settings or command.config
    config = settings(**{field.name: given[field.name] for field in fields(settings)})
    more = [given[argument.lstrip("-")] for argument in command.arguments]
    if name == "validate":  # where a run's settings take the place of the defaults, but of nothing that is said here
        more.append(vars(parser.parse_args(argv, defaults=False)[name].get("data", Namespace())).keys())
    return getattr(commands, name)(config, *more)


def _flush(name: str) -> None:
    """Exit if stdout cannot take what was printed; Python would find out too late, and show a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        report(f"vmamba {name}: {error}")
        sys.exit(1)


def make_parser(name: str | None = None, settings: type | None = None) -> ArgumentParser:
    """The parser of the command line and of YAML files, complete for all commands or for the one of this name.

    Args:
        name: of the command.
        settings: what its flags are, if not the command's own.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="vmamba",
        description="Train, test and use visual state space models. 'vmamba COMMAND --help' explains each command.",
        version=__version__,
    )
    subcommands = parser.add_subcommands(metavar="COMMAND")
    for each, command in COMMANDS.items():
        part = _Parser(usage=f"vmamba {each} {command.usage}", description=command.description)
        if name in (None, each):
            for argument, options in command.arguments.items():
                part.add_argument(argument, **options)
            part.add_argument(
                "--config", action=_ConfigFile, help="YAML file with settings; may be given several times"
            )
            part.add_class_arguments(settings or command.config, None)
        subcommands.add_subcommand(each, part, help=command.help)
    return parser


class _Parser(ArgumentParser):
    """That of one command; of a flag without the name of its group, as --dataset, it says what is meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message, and the settings whose names are there in part."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        for word in dict.fromkeys(re.findall(r'(?:--|Parser key ")([\w.]+)', message)):
            meant = [flag for flag in flags if flag.startswith(f"--{word}.")]
            if f"--{word}" not in flags:
                meant += [flag for flag in flags if flag.endswith(f".{word}")]
            if meant:
                message += f"\n  for --{word} there is {', '.join(meant[:3])}{', ...' * (len(meant) > 3)}"
        super().error(message, ex)


class _ConfigFile(ActionConfigFile):
    """A YAML file with settings; ``base: OTHER.yaml`` in it names a file, relative to it, whose settings come first."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        settings = load_recipe(Path(values)) if os.path.isfile(values) else None
        if isinstance(settings, dict) and (base := settings.pop("base", None)):
            self(parser, cfg, str(Path(values).parent / base))
            values = yaml.safe_dump(settings)
        super().__call__(parser, cfg, values, option_string)
