"""The small recipes under configs/ are what `vmamba train` takes; those of published models have tests of their own."""

from pathlib import Path

import pytest

from vmamba.cli import make_parser, settings_of
from vmamba.models.registry import ENTRIES

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if "published" not in path.stem + path.read_text())
TASKS = {"segmentation": "segmentation", "coco": "detection"}  # by folder; else classification


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_are_complete(path):
    arguments = ["train", "--config", str(path)]
    settings = settings_of("train", arguments)
    parser = make_parser("train", settings)
    given = parser.instantiate(parser.parse_args(arguments))["train"]
    recipe = settings(**{name: value for name, value in vars(given).items() if name != "config"})
    recipe.check()
    assert recipe.task == TASKS.get(path.parent.name, "classification")
    assert ENTRIES[recipe.model.name].task == recipe.task
