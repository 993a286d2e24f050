"""Models for others: folders that the Hugging Face libraries, timm and `create_model` read, and their way to the hub.

A folder holds config.json as timm lays it out, model.safetensors and, as README.md, the model's card. A classifier's is
read by timm and transformers; that of a model for segmentation or detection by this package:

    model, metadata = vmamba.models.registry.load_model("runs/latest/model.safetensors")
    save_folder(model, "my_model", metadata)
    push_to_hub("my_model", "OWNER/NAME")

    vmamba.create_model("hf-hub:OWNER/NAME", pretrained=True)  # or "local-dir:my_model"
    timm.create_model("hf-hub:OWNER/NAME", pretrained=True)  # after `import vmamba`, which tells timm of them
    transformers.pipeline("image-classification", model="OWNER/NAME")
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models._hub import save_config_for_hf  # save_for_hf without the weights
from torch import nn

from vmamba.errors import CheckpointError, HubError, in_one_line
from vmamba.files import atomic_write
from vmamba.models.checkpoints import INPUT_KEYS, default_metadata, named_pattern, per_channel, save_checkpoint
from vmamba.models.feature_maps import DenseModel
from vmamba.models.folders import CARD, CONFIG, WEIGHTS, ModelFolder
from vmamba.models.model_card import CardFacts, model_card
from vmamba.models.vmamba import VMamba
from vmamba.models.weight_files import StrPath

__all__ = ["push_to_hub", "save_folder"]

_GREY = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # how much red, green and blue count in Pillow's grey


def save_folder(
    model: nn.Module,
    folder: StrPath,
    metadata: Mapping[str, Any] | None = None,
    facts: CardFacts | None = None,
    *,
    rgb: bool = False,
) -> list[str]:
    """Write a model to a folder from which others can use it, and that can be uploaded as it is.

    Each file takes the place of what the folder held under its name, all of it or nothing. A card that is already there
    stays, for somebody may have written in it. No file is a pickle.

    Args:
        model: a classifier or backbone that `create_model`, `load_model` or `timm.create_model` made, or one of our
            models for segmentation or detection, on any backbone.
        folder: where to; made if need be.
        metadata: as `load_model` returns it: "class_names", "mean", "std", "interpolation", "crop_pct" and "img_size"
            in place of what the model's configuration says, and whatever else; model.safetensors keeps all of it.
        facts: what the card is to say beside that: licence, data, recipe, results; see `CardFacts`.
        rgb: of a classifier of grey pictures, write one that takes RGB and sees its grey values. transformers'
            pipelines read every picture in RGB.

    Returns:
        The names of the files written.

    Raises:
        CheckpointError: the model is of no kind that can be rebuilt by name, or its arguments cannot be written down.
        OSError: the folder cannot be written to.
    """
    known: dict[str, Any] = dict(metadata or {})
    if rgb:
        model, known = _in_rgb(model, known)
    config = _config_of(model, known)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, path / WEIGHTS, known)
    texts = {CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
    if not (path / CARD).exists():
        name = Path(os.path.abspath(path)).name
        texts[CARD] = model_card(model, known, facts or CardFacts(name))
    for name, text in texts.items():
        with atomic_write(path / name) as file:
            file.write(text.encode())
    return [WEIGHTS, *texts]


def push_to_hub(
    folder: StrPath,
    repository: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str = "Add model",
) -> str:
    """Upload what `save_folder` wrote to the Hugging Face Hub; the repository is made if need be.

    Only config.json, model.safetensors and the card are uploaded, whatever else is in the folder. As timm does it, a
    card that is already on the hub stays.

    Args:
        folder: what `save_folder` wrote.
        repository: "OWNER/NAME", or "NAME" for one of your own.
        token: what the hub gave you; by default that of `hf auth login` or of the environment variable HF_TOKEN.
        private: whether a new repository is seen by you alone; by default as your account has it.
        revision: the branch to write to; by default the main one.
        create_pr: whether to propose the change instead of making it.
        message: of the commit.

    Returns:
        The address of the commit, or of the proposal.

    Raises:
        CheckpointError: the folder holds no such model; see `ModelFolder`.
        HubError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    ModelFolder(f"local-dir:{os.fspath(folder)}")  # an error if it is no such folder
    if not (Path(folder) / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}; pickles are not uploaded. Write it with save_folder.")
    api = HfApi(token=token, library_name="vmamba")
    try:
        made = api.create_repo(repository, private=private, exist_ok=True).repo_id
        has_card = api.file_exists(made, CARD, revision=revision)
        commit = api.upload_folder(
            repo_id=made,
            folder_path=os.fspath(folder),
            allow_patterns=[CONFIG, WEIGHTS] if has_card else [CONFIG, WEIGHTS, CARD],
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
        )
    except Exception as error:  # the client's, the server's, or the network's
        raise HubError(
            f"{repository} could not be uploaded: {in_one_line(error)}. Check the name, the network and, with `hf auth"
            " whoami`, who you are to the hub."
        ) from error
    return str(commit.pr_url or commit.commit_url)


def _config_of(model: nn.Module, known: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json is to hold, in timm's layout.

    Raises:
        CheckpointError: the model cannot be built again from a name and arguments.
    """
    try:
        told = json.loads(json.dumps({**default_metadata(model), **known}, default=named_pattern))
    except TypeError as error:
        raise CheckpointError(f"the model cannot be described in a folder: {error}") from error
    labels = {"label_names": told["class_names"]} if told.get("class_names") else {}
    data = {name: told[name] for name in INPUT_KEYS if told.get(name) is not None}
    data |= {name: per_channel(data[name], told["in_chans"]) for name in ("mean", "std") if name in data}
    if size := told.get("img_size"):
        data["input_size"] = [told["in_chans"], *to_2tuple(size)]
    if isinstance(model, DenseModel) and model.variant is not None:
        sizes = {name: told[name] for name in ("num_classes", "in_chans", "img_size")}
        more = {name: told[name] for name in ("category_ids", "sides") if name in told}
        return {
            "architecture": model.variant,
            "task": model.task,
            "num_classes": told["num_classes"],
            **labels,
            "model_args": {**told["model_kwargs"], **sizes},
            "pretrained_cfg": data,
            **more,
        }
    is_extractor = hasattr(getattr(model, "feature_info", None), "out_indices")
    if not (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or is_extractor:
        raise CheckpointError(
            f"{type(model).__name__} cannot be made again from a name: expected a model that vmamba.create_model,"
            " load_model or timm.create_model returned, without features_only"
        )
    pattern = {name: value for name, value in told["model_kwargs"].items() if name == "pattern"}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / CONFIG
        try:
            save_config_for_hf(model, str(file), model_config=labels, model_args=pattern, data_config=data)
        except ValueError as error:
            raise CheckpointError(f"the model cannot be described in a folder: {error}") from error
        config: dict[str, Any] = json.loads(file.read_text())
    # transformers takes the number of classes from the first level only, and stumbles over a second one.
    config["model_args"].pop("num_classes", None)
    return config


def _in_rgb(model: nn.Module, known: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier of RGB pictures that sees their grey values as a grey classifier does, and its metadata."""
    told = {**default_metadata(model), **known}
    configuration: Any = getattr(model, "pretrained_cfg", None) or {}
    first = configuration.get("first_conv")
    if told.get("in_chans") != 1 or isinstance(model, DenseModel) or not isinstance(first, str):
        raise CheckpointError("rgb is for classifiers of grey pictures, and this is none: leave it out")
    arguments = {**told["model_kwargs"], "num_classes": told["num_classes"], "in_chans": 3}
    statistics = {name: [sum(told[name]) / len(told[name])] * 3 for name in ("mean", "std") if told.get(name)}
    overlay: dict[str, Any] = dict(statistics)
    if (size := told.get("img_size")) and isinstance(model, VMamba):
        arguments["img_size"] = size
    elif size:  # those of timm's that take it as an argument have it among theirs
        overlay["input_size"] = (3, *to_2tuple(size))
    wide = timm.create_model(configuration["architecture"], pretrained_cfg_overlay=overlay, **arguments)
    state = dict(model.state_dict())
    grey = state[f"{first}.weight"]
    state[f"{first}.weight"] = torch.cat([grey * share for share in _GREY], 1)
    wide.load_state_dict(state)
    return wide.train(model.training), known | statistics | {"in_chans": 3, "colours": False}
