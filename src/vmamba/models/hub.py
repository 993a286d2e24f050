"""Classifiers as the Hugging Face libraries and timm keep them: a folder with config.json and model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import nn

from vmamba.files import atomic_write
from vmamba.models.weight_files import StrPath


def save_folder(model: nn.Module, folder: StrPath, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a classifier to a folder that timm and transformers read, and that can be uploaded as it is.

    Wherever the folder is read, `import vmamba` must come first, for that makes the variants known to timm:

        model, metadata = vmamba.models.registry.load_model("runs/latest/model.safetensors")
        save_folder(model, "my_model", metadata)

        timm.create_model("local-dir:my_model", pretrained=True)  # so does vmamba.create_model; "hf-hub:OWNER/NAME"
        transformers.pipeline("image-classification", model="my_model")
        transformers.AutoModelForImageClassification.from_pretrained("my_model")
        huggingface_hub.upload_folder(repo_id="OWNER/NAME", folder_path="my_model")

    Args:
        model: one that `create_model`, `load_model` or `timm.create_model` made.
        folder: where to; made if need be.
        metadata: as `load_model` returns it: "class_names", and "mean", "std", "interpolation", "crop_pct" and
            "img_size" in place of what the model's configuration says.
    """
    known: Any = dict(metadata or {})
    network: Any = model
    data = {name: known[name] for name in ("mean", "std", "interpolation", "crop_pct") if name in known}
    if size := known.get("img_size") or getattr(network, "img_size", None):
        data["input_size"] = (network.in_chans, *size)
    names = {"label_names": known["class_names"]} if known.get("class_names") else {}
    save_for_hf(model, str(folder), model_config=names, data_config=data, safe_serialization=True)
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    # transformers takes the number of classes from the first level only, and stumbles over a second one.
    del config["model_args"]["num_classes"]
    with atomic_write(path) as file:
        file.write(json.dumps(config, indent=2).encode())
