"""The dense models' golden numbers, and files of weights as mmsegmentation and mmdetection write them."""

from __future__ import annotations

import functools
import json
import re
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models.released import foreign_class
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn import functional as F

GOLDEN = Path(__file__).parents[1] / "golden" / "dense"
SEGMENTATION = sorted(GOLDEN.glob("upernet_*_seed*.npz"))
DETECTION = sorted(GOLDEN.glob("maskrcnn_*_seed*.npz"))
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


@functools.cache
def layouts() -> dict[str, Any]:
    """What is known of the published dense models; see tests/golden/dense/README.md."""
    return json.loads((GOLDEN / "dense_layouts.json").read_text())


def draw(name: str, shape: Sequence[int], std: float = 1.0, mean: float = 0.0) -> Tensor:
    """The numbers that belong to a name."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32))


def golden_weights(model: str) -> dict[str, Tensor]:
    """The weights that the golden numbers were made with, under the published names."""
    layout = layouts()["models"][model]
    weights = {name: draw(name, shape, std, mean) for name, shape, mean, std in layout["keys"]}
    return weights | {name: torch.tensor(value) for name, value in layout["integer_keys"].items()}


def write_openmmlab(path: Path, weights: dict[str, Tensor], classes: Sequence[str] = ("a", "b")) -> Path:
    """Write a file as mmengine's training loop does."""

    def get_state(self: Any) -> dict[str, Any]:
        return {"_log_history": np.arange(3.0), "_max_length": 1_000_000, "methods": {"mean": type(self).mean}}

    members = {"__getstate__": get_state, "mean": lambda self: 0.0}
    with foreign_class("mmengine.logging.history_buffer.HistoryBuffer", **members) as history_buffer:
        history_buffer.mean.__module__ = history_buffer.__module__  # type: ignore[attr-defined]
        history_buffer.mean.__qualname__ = "HistoryBuffer.mean"  # type: ignore[attr-defined]
        meta = {
            "epoch": 12, "iter": 87_960, "seed": 1, "mmengine_version": "0.10.7", "cfg": "model = dict(type='X')\n",
            "dataset_meta": {"classes": tuple(classes), "palette": [(220, 20, 60), (119, 11, 32)]},
        }  # fmt: skip
        hub = {"log_scalars": {"train/loss": history_buffer()}, "runtime_info": {"lr": np.float64(1e-4)}}
        optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}, "param_groups": []}
        contents = {
            "meta": meta, "state_dict": OrderedDict(weights), "message_hub": hub, "optimizer": optimizer,
            "param_schedulers": [{"last_step": 12}],
        }  # fmt: skip
        torch.save(contents, path)
    return path


def case_of(path: Path) -> tuple[str, Tensor, tuple[int, int], dict[str, Tensor]]:
    """Model, the network's input (1, 3, H, W), its size without padding, and expected numbers of one golden file."""
    match = re.fullmatch(r"(\w+?)_(1x3x|picture_)(\d+)x(\d+)_seed(\d+)", path.stem)
    assert match
    height, width, seed = (int(group) for group in match.groups()[2:])
    rng = np.random.RandomState(seed)
    with np.load(path) as file:
        expected = {name: torch.from_numpy(file[name]) for name in file}
    if match[2] == "1x3x":
        images = torch.from_numpy(rng.standard_normal((1, 3, height, width)).astype(np.float32))
    else:
        bgr = torch.from_numpy(rng.randint(0, 256, (height, width, 3)).astype(np.uint8))
        images = ((bgr.flip(2) - MEAN) / STD).permute(2, 0, 1)[None]
        *_, padded_height, padded_width = expected["input_shape"].tolist()
        images = F.pad(images, (0, padded_width - width, 0, padded_height - height))
    return match[1], images, (height, width), expected


def assert_close(actual: Tensor, expected: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=0.0)


def assert_map(expected: dict[str, Tensor], name: str, actual: Tensor) -> None:
    """Compare with the `name_shape`, `name_mean` and `name_corner` that there are."""
    if f"{name}_shape" in expected:
        assert list(actual.shape) == expected[f"{name}_shape"].tolist()
    assert_close(actual.mean(dim=(2, 3)), expected[f"{name}_mean"])
    corner = expected[f"{name}_corner"]
    assert_close(actual[:, : corner.shape[1], : corner.shape[2], : corner.shape[3]], corner)


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Booleans from packed bits."""
    return torch.from_numpy(np.unpackbits(bits.numpy())[: int(np.prod(shape))].reshape(tuple(shape)).astype(bool))


class Fixed(nn.Module):
    """A backbone that gives the same maps whatever it is shown."""

    def __init__(self, maps: Sequence[Tensor], strides: Sequence[int]) -> None:
        super().__init__()
        self.maps = list(maps)
        info = [{"num_chs": x.shape[1], "reduction": s, "module": ""} for x, s in zip(maps, strides, strict=True)]
        self.feature_info = FeatureInfo(info, tuple(range(len(maps))))

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps


def fixed_backbone() -> Fixed:
    """Maps of two padded pictures of 160×224 pixels."""
    sizes = {64: (40, 56), 128: (20, 28), 256: (10, 14), 512: (5, 7)}
    return Fixed([draw(f"map{chans}", (2, chans, *size)) for chans, size in sizes.items()], (4, 8, 16, 32))
