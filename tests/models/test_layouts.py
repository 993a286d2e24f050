"""Names, shapes and sizes of the nine published variants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.released import as_released, layouts

import vmamba
from vmamba.models.variants import VARIANTS

PUBLISHED = list(layouts())


def test_the_published_variants_come_first() -> None:
    assert vmamba.list_models()[: len(PUBLISHED)] == PUBLISHED


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameter_count_is_exact(variant: str) -> None:
    model = vmamba.create_model(variant, device="meta")
    count = sum(parameter.numel() for parameter in model.parameters())
    release = VARIANTS[variant].release
    assert release is not None
    assert count == layouts()[variant]["parameters"] == release.params
    assert release.file == layouts()[variant]["released_checkpoint"]


@pytest.mark.parametrize("variant", PUBLISHED)
def test_a_released_file_fits_in_name_and_shape(variant: str, tmp_path: Path) -> None:
    weights = {name: torch.empty(shape) for name, shape, _, _ in layouts()[variant]["keys"]}
    path = tmp_path / "released.pth"
    with torch.serialization.skip_data():  # a file of the right size with nothing in it
        torch.save({"model": as_released(variant, weights)}, path)
    info = vmamba.identify_checkpoint(path)
    assert (info.variant, info.num_classes, info.in_chans) == (variant, 1000, 3)
    assert info.format == "released"
