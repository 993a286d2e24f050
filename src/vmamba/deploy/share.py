"""From a training run to a folder for others, with a card that tells what the run's files know."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vmamba.errors import CheckpointError, ExportError
from vmamba.files import shown
from vmamba.models.folders import CARD
from vmamba.models.hub import save_folder
from vmamba.models.model_card import CardFacts
from vmamba.models.registry import load_model
from vmamba.tasks.recipe import load_recipe
from vmamba.tasks.runs import METRICS, RunFolder


def share(
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    license: str | None = None,
    data: str | None = None,
    repository: str | None = None,
    rgb: bool = False,
) -> list[str]:
    """Write a trained model to a folder that timm, transformers and `create_model` read; see `vmamba.models.hub`.

    The card tells the recipe and the results that lie beside the file in the folder of its run (config.yaml, and
    metrics.json of `vmamba validate`), where they are of this model. No path on this machine is told.

    Args:
        file: any that `load_model` reads.
        folder: where to; made if need be. A card that is already there stays.
        license: as the hub abbreviates it: "mit", "apache-2.0", "cc-by-4.0", "other", ...
        data: what the training images are called; by default as the recipe calls them, a folder by its name.
        repository: "OWNER/NAME" on the hub, for the commands on the card.
        rgb: of a classifier of grey pictures, write one that takes RGB; see `save_folder`.

    Returns:
        Remarks for the user: what is missing or was left out.

    Raises:
        CheckpointError: the file cannot be read, or its model cannot be described in a folder.
        ExportError: the folder cannot be made or written to.
    """
    model, metadata = load_model(file)
    remarks: list[str] = []
    recipe, results = _of_run(Path(file), metadata, remarks)
    name = Path(os.path.abspath(folder)).name
    facts = CardFacts((repository or name).rpartition("/")[2], repository, license, data, recipe, results)
    try:
        written = save_folder(model, folder, metadata, facts, rgb=rgb)
    except OSError as error:
        raise ExportError(f"{shown(folder)} cannot be written to: {error.strerror or error}") from error
    if CARD not in written:
        remarks.append(f"{shown(Path(folder) / CARD)} was there and stays as it is; delete it for a new one")
    elif license is None:
        remarks.append("no licence is named, so others may not use the weights: for instance --license mit")
    return remarks


def _of_run(file: Path, metadata: dict[str, Any], remarks: list[str]) -> tuple[Any, Any]:
    """The recipe and the results beside a file, None for what is not there or of another model."""
    run, recipe, results = RunFolder(file.parent), None, None
    if run.config.is_file():
        recipe = load_recipe(run.config)
        own = (recipe.get("model") or {}).get("name") if isinstance(recipe, dict) else None
        if own is None or own != metadata.get("variant"):
            remarks.append(f"{shown(run.config)} is of another model ({own}): it was left out")
            recipe = None
    found = file.parent / METRICS
    if found.is_file():
        try:
            results = json.loads(found.read_bytes())
            of_this = Path(str(results["weights"])).name == file.name
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{shown(found)} is not what `vmamba validate` writes: {error}. Remove it."
            ) from error
        if not of_this or found.stat().st_mtime < file.stat().st_mtime:
            remarks.append(f"{shown(found)} is older than the model, or of another: it was left out. Validate again")
            results = None
    return recipe, results
