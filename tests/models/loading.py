"""Small models, and what loading a file must do to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vmamba import VMamba, create_model, load_checkpoint
from vmamba.errors import CheckpointError

SMALL = "vmamba_femto_s2"
State = dict[str, Tensor]


def small(**options: Any) -> nn.Module:
    return create_model(SMALL, **{"num_classes": 10, "in_chans": 3, **options})


def vanilla() -> VMamba:
    """A very small model with all that the vanilla variants have."""
    return VMamba(
        img_size=32, num_classes=10, depths=(1, 2, 1), dims=(16, 32, 48), d_state=4, ssm_ratio=2.0, mlp_ratio=0.0,
        gated=True, conv_bias=True, stem="patch", downsample="merge",
    )  # fmt: skip


def assert_equal(model: nn.Module, expected: State) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def assert_refused_unchanged(model: nn.Module, path: Path, *words: str, **options: Any) -> str:
    """Loading fails with an error that has these words, and leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path, **options)
    assert_equal(model, before)
    message = str(caught.value)
    for word in words:
        assert word in message
    return message
