"""Folders that hold a model, on this machine or on the Hugging Face Hub: config.json beside the weights.

The layout is timm's, and `vmamba.models.hub` writes it. A folder is untrusted: the configuration is JSON of bounded
size, and the weights are read by `vmamba.models.weight_files` alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmamba.errors import CheckpointError, CheckpointNotFoundError
from vmamba.models.checkpoints import INPUT_KEYS, identify_checkpoint

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# In the order in which timm looks for them. Those of torch.save are read without running what is in them.
_WEIGHTS = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth", "open_clip_model.safetensors")
_LARGEST_CONFIG = 1 << 24  # bytes; several times what the 21,842 names of ImageNet-22k and their descriptions take
_LOCAL, _HUB = ("local-dir",), ("hf-hub", "hf_hub")
_EXPECTED = f"Expected a folder with {CONFIG} and {WEIGHTS}, as vmamba.models.hub.save_folder and timm write them."


def is_source(name: str) -> bool:
    """Whether a model's name says where a folder is: "local-dir:FOLDER" or "hf-hub:OWNER/NAME"."""
    return name.partition(":")[0].lower() in _LOCAL + _HUB and ":" in name


def source_of(path: str | os.PathLike[str]) -> str | None:
    """A name for `ModelFolder`, if this is one or the path of a folder; None for the path of a file."""
    name = os.fspath(path)
    if is_source(name):
        return name
    return f"{_LOCAL[0]}:{name}" if os.path.isdir(name) else None


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a model.

    Args:
        name: "local-dir:FOLDER", or "hf-hub:OWNER/NAME" or "hf-hub:OWNER/NAME@REVISION".
        cache_dir: where files from the hub are kept; by default where the Hugging Face libraries keep theirs.

    Attributes:
        config: what config.json holds.
        path: the folder with config.json; of a model on the hub, where it was fetched to.

    Raises:
        CheckpointError: there is no such folder, it cannot be fetched, or its config.json is not that of a model.
    """

    name: str
    cache_dir: str | None = None
    config: dict[str, Any] = field(init=False, repr=False)
    path: Path = field(init=False, repr=False)

    def __post_init__(self) -> None:
        path = self._file(CONFIG)
        if path is None:
            raise CheckpointNotFoundError(f"{self.name} holds no model: there is no {CONFIG}. {_EXPECTED}")
        try:
            if path.stat().st_size > _LARGEST_CONFIG:
                raise ValueError(f"it has more than {_LARGEST_CONFIG:,} bytes")
            config = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}. Fetch it again. {_EXPECTED}") from error
        parts = {name: config.get(name) for name in ("model_args", "pretrained_cfg")} if type(config) is dict else None
        if parts is None or not all(value is None or type(value) is dict for value in parts.values()):
            raise CheckpointError(f"{path} is not the configuration of a model. {_EXPECTED}")
        if type(config.get("architecture", (config.get("pretrained_cfg") or {}).get("architecture"))) is not str:
            other = f", but a model of another library, {config['model_type']!r}" if "model_type" in config else ""
            raise CheckpointError(f'{path} names no "architecture" of timm\'s or ours{other}. {_EXPECTED}')
        object.__setattr__(self, "config", config)
        object.__setattr__(self, "path", path.parent)

    @property
    def architecture(self) -> str:
        """The model's name for `vmamba.create_model` or `timm.create_model`."""
        return self.config.get("architecture") or self.config["pretrained_cfg"]["architecture"]

    @property
    def task(self) -> str:
        """What the model is for; timm's configurations, of classifiers all, do not say it."""
        return str(self.config.get("task") or "classification")

    def weights(self) -> Path:
        """The file with the weights, fetched if need be.

        Raises:
            CheckpointError: there is none, or it cannot be fetched.
        """
        known = (self.config.get("pretrained_cfg") or {}).get("hf_hub_filename")
        for file in (*([known] if type(known) is str else []), *_WEIGHTS):
            if path := self._file(file):
                return path
        raise CheckpointNotFoundError(f"{self.name} has a {CONFIG}, but no weights beside it. {_EXPECTED}")

    def metadata(self) -> dict[str, Any]:
        """What the configuration says of the model, under the names that `save_checkpoint` uses."""
        config, arguments = self.config, dict(self.config.get("model_args") or {})
        told: Mapping[str, Any] = config.get("pretrained_cfg") or config
        known = {name: told.get(name) for name in INPUT_KEYS}
        known |= {name: config.get(name) for name in ("task", "category_ids", "sides")}
        chans, size = arguments.pop("in_chans", None), arguments.pop("img_size", None)
        arguments.pop("num_classes", None)
        if type(told.get("input_size")) is list and len(told["input_size"]) == 3:
            chans, size = chans or told["input_size"][0], size or told["input_size"][1:]
        names = config.get("label_names", told.get("label_names"))
        known |= {
            "variant": self.architecture,
            "class_names": list(names.values()) if type(names) is dict else names,
            "num_classes": config.get("num_classes", told.get("num_classes")),
            "in_chans": chans,
            "img_size": size,
            "model_kwargs": arguments,
        }
        return {name: value for name, value in known.items() if value is not None}

    def _file(self, file: str) -> Path | None:
        """One of its files, or None where it has none of this name."""
        source, _, place = self.name.partition(":")
        if Path(file).name != file:
            raise CheckpointError(f"{self.name} names a file outside itself, {file!r}")
        if source.lower() in _HUB:
            return self._fetched(place, file)
        path = Path(place) / file
        if not Path(place).is_dir():
            what = "is a file; name the folder it is in" if Path(place).exists() else "does not exist"
            raise CheckpointNotFoundError(f"{self.name}: {place!r} {what}. {_EXPECTED}")
        return path if path.is_file() else None

    def _fetched(self, place: str, file: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        repository, _, revision = place.partition("@")
        try:
            return Path(
                hf_hub_download(
                    repository, file, revision=revision or None, cache_dir=self.cache_dir, library_name="vmamba"
                )
            )
        except LocalEntryNotFoundError as error:  # which is an EntryNotFoundError too
            reason = "the hub cannot be reached, and the file is not in the cache"
            cause: Exception = error
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:  # no such repository, no right to it, no such revision, no name
            reason, cause = str(error).strip().partition("\n")[0], error
        raise CheckpointError(
            f"cannot fetch {file} of {self.name}: {reason}. Check the name, and `hf auth login` for private models; or"
            " fetch the folder another way and give local-dir:FOLDER."
        ) from cause


def task_of(path: str | os.PathLike[str]) -> str:
    """What the model of a file or of a folder is for, without building it.

    Raises:
        CheckpointError: it cannot be read, or holds no model.
    """
    source = source_of(path)
    return ModelFolder(source).task if source else identify_checkpoint(path).task
