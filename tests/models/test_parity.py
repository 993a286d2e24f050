"""Every golden case: weights written as a released file, read back, and the network's numbers compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from models.released import GOLDEN, as_released, golden_weights, theirs, write_released
from torch import Tensor

import vmamba

CASES = sorted(GOLDEN.glob("*_seed*.npz"))
Restored = Callable[[str], torch.nn.Module]


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    """Models by name, each with the golden weights read from a file in the released format."""
    models: dict[str, torch.nn.Module] = {}

    def get(variant: str) -> torch.nn.Module:
        if variant not in models:
            path = tmp_path_factory.mktemp("released") / f"{variant}.pth"
            write_released(path, as_released(variant, golden_weights(variant)))
            model = vmamba.create_model(variant, checkpoint=path)
            path.unlink()
            models[variant] = model.eval()
        return models[variant]

    return get


def case_of(path: Path) -> tuple[str, Tensor, dict[str, Tensor]]:
    """Variant, input images and expected numbers of one golden file."""
    match = re.fullmatch(r"(\w+)_(\d+)x3x(\d+)x(\d+)_seed(\d+)", path.stem)
    assert match
    batch, height, width, seed = (int(group) for group in match.groups()[1:])
    images = np.random.RandomState(seed).standard_normal((batch, 3, height, width)).astype(np.float32)
    with np.load(path) as file:
        return match[1], torch.from_numpy(images), {name: torch.from_numpy(file[name]) for name in file}


def assert_close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0.0)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_forward_and_backward_match_the_authors_numbers(path: Path, restored: Restored) -> None:
    variant, images, expected = case_of(path)
    model = restored(variant)
    has_gradients = "grad_norms_json" in expected
    images.requires_grad_(has_gradients)

    with torch.set_grad_enabled(has_gradients):
        features, stages = model.forward_intermediates(images)
        logits = model.forward_head(features)
    assert_close(logits.detach(), expected["logits"], atol=1e-4)
    for number, stage in enumerate(stages, start=1):
        assert list(stage.shape) == expected[f"stage{number}_shape"].tolist()
        assert_close(stage.detach().mean(dim=(2, 3)), expected[f"stage{number}_mean"], atol=1e-4)
        corner = expected[f"stage{number}_corner"]
        assert_close(stage.detach()[:, :8, : corner.shape[2], : corner.shape[3]], corner, atol=1e-4)

    if has_gradients:
        model.zero_grad()
        (logits * torch.linspace(-1, 1, 1000)).sum().backward()
        assert images.grad is not None
        of_input = expected.get("grad_input", expected.get("grad_input_corner"))
        height, width = of_input.shape[2:]
        largest = images.grad.abs().max().item()
        assert_close(images.grad[:, :, :height, :width], of_input, atol=1e-3 * largest)
        norms = json.loads(expected["grad_norms_json"].numpy().tobytes())
        gradients = theirs({name: parameter.grad for name, parameter in model.named_parameters()})
        assert gradients.keys() == norms.keys()
        for name, norm in norms.items():
            assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3), name
