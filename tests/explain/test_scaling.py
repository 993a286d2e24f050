"""What models cost against the size of the images, where the answer is known, and accuracy by size."""

from __future__ import annotations

import copy
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import vmamba
from vmamba.cli import main
from vmamba.data.config import DataConfig
from vmamba.data.sources import open_split
from vmamba.errors import DataError
from vmamba.explain.memory import peak_memory
from vmamba.explain.resolution import accuracy_by_size, at_size
from vmamba.explain.scaling import Cost, fitted_exponents, scaling
from vmamba.models.checkpoints import save_checkpoint

VIT = {"img_size": 64, "depth": 1, "embed_dim": 32, "num_heads": 1}
SIZES = (64, 128, 256)


def test_exponents_are_slopes():
    costs = [Cost(size, 3 * size**2, 7, 1e-9 * size**4, None) for size in SIZES]
    assert fitted_exponents(costs) == pytest.approx({"flops": 1, "params": 0, "seconds": 2})
    bent = [Cost(side, flops, 1) for side, flops in ((1, 1), (10, 100), (100, 10**6))]
    assert fitted_exponents(bent)["flops"] == pytest.approx(1.5)
    assert fitted_exponents(bent[1:])["flops"] == pytest.approx(2)


def test_ours_is_linear_and_attention_is_not():
    """Counted: every number of the exponents follows from the definition of the networks."""
    models = {"ours": "vmamba_femto_s2", "vit": timm.models.VisionTransformer(**VIT)}
    ours, vit = scaling(models, SIZES, rounds=0, memory=False)
    assert [cost.size for cost in ours.costs] == list(SIZES)
    assert ours.exponents["flops"] == pytest.approx(1, abs=1e-3)
    assert ours.exponents["params"] == 0
    assert {cost.params for cost in ours.costs} == {
        sum(p.numel() for p in vmamba.create_model("vmamba_femto_s2").parameters())
    }
    tokens = [(size // 16) ** 2 + 1 for size in SIZES]
    linear = [32 * (768 * (n - 1) + 12 * 32 * n) + 32_000 for n in tokens]
    assert [cost.flops for cost in vit.costs] == [a + 2 * 32 * n**2 for a, n in zip(linear, tokens, strict=True)]
    assert 1 < vit.exponents["flops"] < vit.last_exponents["flops"] < 2
    assert vit.numbers()["costs"][0]["seconds"] is None
    assert models["vit"].patch_embed.img_size == (64, 64)


class Listener(nn.Module):
    """Notes the sizes of the images that it is given."""

    in_chans = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.shape[-1])
        return nn.functional.conv2d(x, self.weight.expand(1, 1, 1, 1))


def test_models_take_turns_and_functions_make_them():
    made: dict[int, Listener] = {}
    first, second = scaling(
        {"a": lambda size: made.setdefault(size, Listener()), "b": "vmamba_femto_s2"}, (16, 32), 3, memory=False
    )
    assert list(made) == [16, 32]
    assert made[16].calls == [16] * 4  # one is not counted; none for the count, which is of a copy
    assert all(cost.seconds > 0 for cost in first.costs + second.costs)
    assert math.isfinite(second.exponents["seconds"])


def test_models_given_are_left_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()).eval().train()
    model[1].eval()
    scaling({"x": model}, (16, 32), rounds=0, memory=False, device="meta")
    assert [module.training for module in model.modules()] == [True, True, False]
    assert model[0].weight.device.type == "cpu"


def test_wrong_arguments():
    with pytest.raises(ValueError, match="two sizes"):
        scaling(["vmamba_femto"], (32,))
    with pytest.raises(ValueError, match="no model 'vmamba_enormous'"):
        scaling(["vmamba_enormous"], (32, 64))


def test_peak_memory_is_what_a_pass_needs():
    """In a process of its own: a layer whose output takes 64 MiB, whatever this process holds."""
    held = torch.ones(2**26)
    layer = nn.Sequential(nn.Conv2d(1, 64, 1), nn.AdaptiveAvgPool2d(1))
    assert peak_memory(layer, (1, 1, 512, 512)) == pytest.approx(2**26, rel=0.1)
    assert held.sum() == 2**26
    layer.hook = lambda: None
    with pytest.raises(ValueError, match="define its class in a module"):
        peak_memory(layer, (1, 1, 8, 8))


# --- accuracy --------------------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """Says 1 for bright images, and for all that are smaller than 32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(tuple(x.shape))
        bright = (x.mean((1, 2, 3)) > 0) | torch.tensor(x.shape[-1] < 32)
        return torch.stack((~bright, bright), 1).float()


def test_accuracy_is_counted_at_every_size(tmp_path: Path):
    pictures = [(np.full((40, 50, 3), 255 * label, np.uint8), label) for label in (0, 1, 1, 0, 0)]
    model = Brightness()
    (found,) = accuracy_by_size({"x": model}, pictures, (48, 16, 32), batch_size=3)
    assert (found.sizes, found.accuracies, found.images) == ((16, 32, 48), (0.4, 1.0, 1.0), 5)
    assert model.sizes == [(n, 3, size, size) for size in (16, 32, 48) for n in (3, 2)]

    for index, (pixels, label) in enumerate(pictures):
        folder = tmp_path / "val" / ("dark", "light")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    split = open_split(DataConfig(root=str(tmp_path)), training=False)
    assert accuracy_by_size({"x": model}, split, (16, 32))[0].accuracies == (0.4, 1.0)
    (found,) = accuracy_by_size({"x": model}, pictures, (16,), limit=2)
    assert (found.accuracies, found.images) == ((0.5,), 2)
    model.num_classes = 1000
    with pytest.raises(DataError, match="val has 2 classes, and x tells 1000 apart; expected the same classes"):
        accuracy_by_size({"x": model}, split, (16,))
    with pytest.raises(ValueError, match="0 pictures"):
        accuracy_by_size({"x": model}, [], (16,))


def test_accuracy_is_that_of_evaluation_mode():
    model = nn.Sequential(Brightness(), nn.BatchNorm1d(2)).train()
    model[0].eval()
    pictures = [(np.full((8, 8, 3), value, np.uint8), int(value > 128)) for value in (255, 0, 0, 255)]
    before = copy.deepcopy(model.state_dict())
    (found,) = accuracy_by_size({"x": model}, pictures, (32,))
    assert found.accuracies == (1.0,)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, False, True]


def test_fixed_sizes_are_interpolated_in_a_copy():
    vit, ours = timm.models.VisionTransformer(**VIT), vmamba.create_model("vmamba_femto_s2")
    assert at_size(ours, (50, 70)) is ours
    assert at_size(vit, (64, 64)) is vit
    larger = at_size(vit, (96, 128))
    assert larger(torch.zeros(1, 3, 96, 128)).shape == (1, 1000)
    assert vit.pos_embed.shape[1] == 17
    swin = timm.models.SwinTransformer(img_size=64, depths=(1, 1), embed_dim=24, num_heads=(2, 2), window_size=4)
    assert at_size(swin, (128, 192)).layers[0].blocks[0].window_size == (4, 4)
    small, large = scaling({"swin": swin}, (64, 256), rounds=0, memory=False)[0].costs
    assert large.flops / small.flops == pytest.approx(16, rel=2e-2)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fields before and after training, costs, and accuracy, beside another model."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("vmamba.explain.scaling")  # the package's attribute is the function
    monkeypatch.setattr(module, "peak_memory", lambda model, shape: 8 * shape[2] * shape[3])
    options = {"depths": [1, 1], "dims": [8, 12]}
    for name in ("model", "other"):
        model = vmamba.create_model("vmamba_femto_s2", num_classes=2, in_chans=3, **options)
        save_checkpoint(model, tmp_path / f"{name}.safetensors", {"model_kwargs": options, "class_names": ["a", "b"]})
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        folder = tmp_path / "pictures/val" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    arguments = ["pictures/val/a", "--what", "field,scaling,accuracy", "--checkpoint", "model.safetensors", "--beside",
                 "other.safetensors", "--labelled", "pictures", "--limit", "4", "--output", "out"]  # fmt: skip
    assert main(["explain", *arguments]) == 0
    found = json.loads((tmp_path / "out/explain.json").read_text())
    names = ["model.safetensors", "other.safetensors"]
    fields = [f"{name}, {when}" for name in names for when in ("as drawn", "trained")]
    assert [field["name"] for field in found["field"]["models"]] == fields
    assert all(0 < field["side_50"] <= field["side_90"] <= 64 for field in found["field"]["models"])
    first = found["scaling"]["models"][0]
    assert [cost["size"] for cost in first["costs"]] == [32, 64, 96, 128]
    assert first["exponents"]["flops"] == pytest.approx(1, abs=0.01)
    assert first["exponents"]["memory"] == pytest.approx(1)
    assert [each["images"] for each in found["accuracy"]["models"]] == [4, 4]
    assert found["accuracy"]["models"][0]["sizes"] == [32, 64, 96]
    for part in ("field", "scaling", "accuracy"):
        with Image.open(tmp_path / found[part]["figure"]) as image:
            assert min(image.size) > 300


def test_accuracy_needs_the_classes_of_the_model(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("resnet10t", num_classes=5)
    save_checkpoint(model, "five.safetensors", {"variant": "resnet10t", "img_size": [32, 32]})
    for name in "ab":
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / name / "0.png")
    assert main(["explain", "--what", "accuracy", "--checkpoint", "five.safetensors", "--labelled", "."]) == 1
    assert "has 2 classes, and five.safetensors tells 5 apart" in capsys.readouterr().err
