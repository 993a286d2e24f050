"""Models by name, and rebuilt from files alone: ours, others of timm's, and networks built on a VMamba."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models.loading import SMALL, assert_equal, assert_refused_unchanged, small
from models.released import prefixed, theirs
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import vmamba
from vmamba.errors import CheckpointError
from vmamba.models import registry, weight_files
from vmamba.models.checkpoints import default_metadata, save_checkpoint
from vmamba.models.hub import save_folder
from vmamba.models.registry import Entry, load_model, register
from vmamba.models.variants import VARIANTS
from vmamba.tasks.prediction import Classifier


def test_models_are_listed_by_task() -> None:
    assert vmamba.list_models() == vmamba.list_models("classification") == list(VARIANTS)
    assert "upernet_vmamba_tiny_s1l8" in vmamba.list_models("segmentation")
    assert "maskrcnn_vmamba_tiny_s1l8" in vmamba.list_models("detection")
    with pytest.raises(ValueError, match="there is no task 'depth'; expected one of classification, detection, segm"):
        vmamba.list_models("depth")


def test_what_was_published_is_told_before_a_model_is_built() -> None:
    entry, release = registry.ENTRIES["vmamba_tiny_s1l8"], VARIANTS["vmamba_tiny_s1l8"].release
    assert release is not None
    assert (entry.url, entry.params, entry.flops) == (release.url, 30_249_064, 4.9)
    assert entry.published == {"top1": 82.6}
    assert registry.ENTRIES["vmamba_nano"].url is None


@pytest.mark.parametrize(
    "load",
    [
        lambda path: load_model(path),
        lambda path: load_model(path, ema=True),
        lambda path: small(checkpoint=path),
        lambda path: vmamba.create_model(SMALL, checkpoint=path, features_only=True),
        lambda path: small(pretrained=True, pretrained_cfg_overlay={"file": str(path)}),
        lambda path: small(pretrained=True, num_classes=3, in_chans=1, pretrained_cfg_overlay={"file": str(path)}),
        lambda path: vmamba.load_checkpoint(small(), path),
        vmamba.identify_checkpoint,
    ],
)
def test_a_file_is_read_once(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = small().state_dict()
    torch.save({"model": state, "model_ema": state}, path := tmp_path / "weights.pth")
    reads = []

    def read(path: Path) -> Any:
        reads.append(path)
        return weight_files.read_weight_file(path)

    monkeypatch.setattr("vmamba.models.checkpoints.read_weight_file", read)
    load(path)
    assert reads == [path]


def test_the_averaged_weights_when_asked_for(tmp_path: Path) -> None:
    plain, average = small().state_dict(), small().state_dict()
    torch.save({"model": plain, "model_ema": average}, path := tmp_path / "weights.pth")
    assert_equal(load_model(path)[0], plain)
    assert_equal(load_model(path, ema=True)[0], average)
    torch.save(plain, path)
    with pytest.raises(CheckpointError, match="holds no ema weights"):
        load_model(path, ema=True)
    torch.save({"model_ema": average}, path)  # and of those alone nobody has to ask
    assert_equal(load_model(path)[0], average)


# --- Others of timm's ------------------------------------------------------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 24},
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 32, "class_token": False, "global_pool": "avg"},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "deit_tiny_distilled_patch16_224": {"depth": 1, "img_size": 32},
}
others = pytest.mark.parametrize("name", OTHERS)


def other(name: str, num_classes: int = 5, in_chans: int = 4) -> nn.Module:
    return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **OTHERS[name]).eval()


@others
def test_another_of_timms_models_is_rebuilt_from_its_file(name: str, tmp_path: Path) -> None:
    model = other(name)
    save_checkpoint(
        nn.ModuleDict({"module": model}), path := tmp_path / "model.safetensors", {"class_names": [*"abcde"]}
    )
    info = vmamba.identify_checkpoint(path)
    assert (info.format, info.variant, info.num_classes, info.in_chans, info.task) == (
        "vmamba", name, 5, 4, "classification",
    )  # fmt: skip
    again, metadata = load_model(path)
    assert_equal(again, model.state_dict())
    assert (metadata["variant"], metadata["class_names"]) == (name, [*"abcde"])
    images = torch.randn(2, 4, 32, 32)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "test_maxvit"])
def test_the_size_that_another_of_timms_models_is_for_is_kept(name: str, tmp_path: Path) -> None:
    """Convolutions have it in timm's configuration alone, ViTs as an argument too, MaxViTs as an attribute besides."""
    Image.effect_noise((70, 50), 50).save(tmp_path / "picture.png")
    changes = {"img_size": (64, 96)} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    trained = {"img_size": [64, 96], "mean": [0.5], "std": [0.2]}
    cases: list[tuple[dict[str, Any], dict[str, Any], tuple[int, int]]] = [
        ({}, {}, (160, 160)),
        (changes, trained, (64, 96)),
        (changes, trained | {"model_kwargs": {}}, (64, 96)),  # where the size is no argument, it is enough
    ]
    for arguments, told, size in cases:
        model = timm.create_model(name, num_classes=3, in_chans=1, **arguments).eval()
        save_checkpoint(model, path := tmp_path / "model.safetensors", told)
        again, metadata = load_model(path)
        assert metadata["img_size"] == list(size)
        assert (default_metadata(again)["img_size"], again.pretrained_cfg["input_size"]) == (size, (1, *size))
        images = torch.randn(2, 1, *size)
        assert torch.equal(again(images), model(images))
        assert [each.error for each in Classifier.load(str(path)).predict([str(tmp_path / "picture.png")])] == [None]


@others
def test_weights_of_another_of_timms_models(name: str, tmp_path: Path) -> None:
    state = other(name).state_dict()
    contents = {
        "epoch": 3,
        "state_dict": prefixed("module.", state),
        "state_dict_ema": {n: 2 * t for n, t in state.items()},
    }
    torch.save(contents, path := tmp_path / "weights.pth")
    model = other(name)
    info = vmamba.load_checkpoint(model, path)
    assert_equal(model, state)
    assert (info.num_classes, info.in_chans, info.weights) == (5, 4, ("model", "ema"))

    first_conv = model.pretrained_cfg["first_conv"]
    first_conv = f"{first_conv}.weight"
    message = assert_refused_unchanged(other(name, num_classes=7), path, "for 5 classes, the model for 7")
    assert "num_classes=5" in message
    assert_refused_unchanged(other(name, in_chans=3), path, "for images of 4 channels", first_conv)
    vmamba.load_checkpoint(model := other(name, num_classes=7, in_chans=8), path, reset_head=True, adapt_input=True)
    torch.testing.assert_close(model.state_dict()[first_conv], torch.cat([state[first_conv]] * 2, dim=1) / 2)

    del state[next(reversed(state))]
    state["extra"] = torch.zeros(2)
    torch.save(state, path)
    assert_refused_unchanged(other(name), path, "1 tensors missing, 1 unexpected", "unexpected: extra (2,)")


def test_networks_that_a_file_holds_side_by_side_are_not_guessed_at(tmp_path: Path) -> None:
    state = other("resnet18").state_dict()
    torch.save({"student": state, "teacher": state}, path := tmp_path / "weights.pth")
    assert_refused_unchanged(other("resnet18"), path, "several networks, 'student.' and 'teacher.'")


# --- A network built on a VMamba -------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A backbone, a norm on its last map, and a head."""

    task = "segmentation"

    def __init__(
        self, name: str, num_classes: int = 6, in_chans: int = 3, width: int = 4, img_size: Any = (32, 32), **_: Any
    ) -> None:
        super().__init__()
        self.variant, self.num_classes, self.in_chans, self.img_size = name, num_classes, in_chans, img_size
        self.pretrained_cfg = {"classifier": "decode_head.conv_seg", "first_conv": "backbone.model.stem.conv1"}
        self._model_args = {"width": width}
        self.backbone = timm.create_model(SMALL, features_only=True, out_indices=(0, 1, 2), in_chans=in_chans)
        self.backbone.outnorm2 = nn.LayerNorm(192)
        self.decode_head = nn.ModuleDict({"conv": nn.Linear(192, width), "conv_seg": nn.Linear(width, num_classes)})


@pytest.fixture
def toy() -> Iterator[str]:
    name = f"toy_{SMALL}"
    register(Entry(name, "segmentation", lambda **options: Toy(name, **options), (32, 32), SMALL))
    yield name
    del registry.ENTRIES[name]


def as_openmmlab(model: nn.Module) -> dict[str, Tensor]:
    """A toy's weights as mmsegmentation would name them."""
    state = model.state_dict()
    backbone = {n.removeprefix("backbone.model."): t for n, t in state.items() if n.startswith("backbone.model.")}
    others = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.model.")}
    return prefixed("backbone.", theirs(backbone)) | others


@pytest.mark.parametrize("openmmlab", [True, False])
def test_a_network_on_a_vmamba_is_rebuilt_from_a_file(openmmlab: bool, toy: str, tmp_path: Path) -> None:
    model = vmamba.create_model(toy, num_classes=3, in_chans=4, width=4 if openmmlab else 7)
    path = tmp_path / "model"
    if openmmlab:
        torch.save({"meta": {"epoch": 1}, "state_dict": as_openmmlab(model)}, path)
    else:
        save_checkpoint(model, path)
    info = vmamba.identify_checkpoint(path)
    assert (info.task, info.variant, info.format) == (
        "segmentation",
        SMALL,
        "mmsegmentation" if openmmlab else "vmamba",
    )
    assert_equal(vmamba.create_model(toy, checkpoint=path, num_classes=3, in_chans=4, width=4 if openmmlab else 7),
                 model.state_dict())  # fmt: skip
    if not openmmlab:
        again, metadata = load_model(path)
        assert_equal(again, model.state_dict())
        assert (metadata["task"], metadata["variant"], metadata["model_kwargs"]) == ("segmentation", toy, {"width": 7})


def test_a_published_head_of_another_size_is_drawn_anew(toy: str, tmp_path: Path, monkeypatch: Any) -> None:
    torch.save({"state_dict": as_openmmlab(published := vmamba.create_model(toy))}, path := tmp_path / "released.pth")
    with pytest.raises(CheckpointError, match=f"{toy} has no published weights"):
        vmamba.create_model(toy, pretrained=True)
    monkeypatch.setattr(registry, "_published", lambda name, url: path)
    assert_equal(vmamba.create_model(toy, pretrained=True), published.state_dict())
    model = vmamba.create_model(toy, pretrained=True, num_classes=2)
    assert torch.equal(model.decode_head["conv"].weight, published.decode_head["conv"].weight)
    assert len(model.decode_head["conv_seg"].weight) == 2


def test_a_missing_part_of_the_head_is_named(toy: str, tmp_path: Path) -> None:
    state = as_openmmlab(vmamba.create_model(toy))
    del state["decode_head.conv.weight"], state["backbone.outnorm2.bias"]
    torch.save({"state_dict": state}, path := tmp_path / "weights.pth")
    message = assert_refused_unchanged(vmamba.create_model(toy), path, f"does not fit {toy}: 2 tensors missing")
    assert "missing: backbone.outnorm2.bias (192,); decode_head.conv.weight (4, 192)" in message


# --- Files that ask for the impossible -------------------------------------------------------------------------------


IMPOSSIBLE: dict[str, list[dict[str, Any]]] = {
    SMALL: [
        {"ssm_ratio": 1e999}, {"ssm_ratio": -1}, {"ssm_ratio": 1e308}, {"mlp_ratio": -1}, {"mlp_ratio": float("nan")},
        {"drop_path_rate": 1e308}, {"drop_path_rate": 10**400}, {"drop_rate": 7}, {"depths": [10**9, 1, 1]},
        {"depths": [10**6, 1, 1]}, {"depths": "abc"}, {"depths": []}, {"depths": [1] * 100_000},
        {"dims": [10**9] * 3}, {"dims": [0, 0, 0]}, {"dims": [-8, 8, 8]}, {"d_state": 10**6}, {"d_state": "1"},
        {"stem_stride": 0}, {"pattern": ["cross"]}, {"output_stride": 5}, {"global_pool": "sum"}, {"unknown": 1},
        {"img_size": [10**30]}, {"depths": {"0": {"device": 1}}},
    ],
    "resnet18": [{"drop_rate": 1e308}, {"layers": [10**6, 1]}, {"pretrained_cfg": {}}, {"checkpoint_path": "x"}],
    "swin_tiny_patch4_window7_224": [{"depths": [10**6, 1, 1, 1]}, {"embed_dim": -1}, {"window_size": 0}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "number"), [(variant, i) for variant, kwargs in IMPOSSIBLE.items() for i in range(len(kwargs))]
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_impossible_arguments_cost_nothing(variant: str, number: int, tmp_path: Path) -> None:
    kwargs = IMPOSSIBLE[variant][number]
    model = small() if variant == SMALL else timm.create_model("resnet18", num_classes=2)
    save_checkpoint(model, path := tmp_path / "model.safetensors", {"variant": variant, "model_kwargs": kwargs})
    before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert time.process_time() - before < 10, kwargs
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # KiB
    assert str(path) in str(caught.value)


# --- Folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_timm(tmp_path: Path) -> None:
    model = vmamba.create_model(SMALL, num_classes=3, in_chans=4, dims=(16, 24, 32)).eval()
    model.set_input_size((40, 48))
    save_folder(model, tmp_path, {"class_names": ["ant", "bee", "猫"], "mean": [0.1] * 4, "std": [0.5] * 4})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == ["ant", "bee", "猫"]
    assert config["pretrained_cfg"]["input_size"] == [4, 40, 48]
    images = torch.randn(2, 4, 40, 48)
    for create in (timm.create_model, vmamba.create_model):
        again = create(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert torch.equal(again(images), model(images))
        assert resolve_model_data_config(again)["input_size"] == (4, 40, 48)
        assert (again.img_size, again.num_classes, again.pretrained_cfg["mean"]) == ((40, 48), 3, [0.1] * 4)


def test_a_folder_is_read_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = vmamba.create_model(SMALL, num_classes=3, in_chans=3).eval()
    save_folder(model, tmp_path, {"class_names": ["ant", "bee", "cat"]})
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images).logits, model(images))
    picture = Image.effect_mandelbrot((60, 50), (-2.0, -1.5, 1.0, 1.5), 100).convert("RGB")
    found = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu")(picture)
    transform = create_transform(**resolve_model_data_config(model))
    confidences = model(transform(picture)[None]).softmax(1)[0]
    scores = {entry["label"]: entry["score"] for entry in found}
    assert scores == pytest.approx(dict(zip(("ant", "bee", "cat"), confidences.tolist(), strict=True)), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", ["a"]), ("mean", [math.nan] * 3), ("mean", 5), ("std", None), ("std", [0, 0, 0]), ("std", 5),
        ("interpolation", "x"), ("interpolation", 5), ("crop_pct", -1), ("crop_pct", 1e-9),
        ("crop_pct", math.inf), ("crop_pct", "x"), ("crop_mode", "x"), ("crop_mode", ["center"]),
        ("img_size", [100_000, 100_000]), ("img_size", [32.5, 32]), ("img_size", [32, 32, 32]), ("img_size", [-8, -8]),
        ("img_size", ["a", "b"]), ("class_names", 5),
        ("class_names", {"a": 1}), ("class_names", [["x"], ["y"], ["z"]]),
    ],
)  # fmt: skip
def test_metadata_that_nothing_can_be_done_with(tmp_path, name, value):
    model = vmamba.create_model("vmamba_femto_s2", num_classes=3)
    save_checkpoint(model, path := tmp_path / "model.safetensors", {name: value})
    with pytest.raises(CheckpointError, match=f"describes a model that cannot be built: .*{name} "):
        load_model(path)
    save_checkpoint(model, path, {"task": "detection"})
    with pytest.raises(CheckpointError, match="says that it is for 'detection', but vmamba_femto_s2 is for classif"):
        load_model(path)


def test_advice_is_given_only_where_it_helps(tmp_path):
    """A head of another dtype needs no other number of classes, other options of a variant no other variant."""
    model = vmamba.create_model("vmamba_femto_s2", num_classes=3)
    state = model.state_dict()
    torch.save(state | {"head.fc.weight": state["head.fc.weight"].to(torch.complex64)}, tmp_path / "complex.pth")
    with pytest.raises(CheckpointError, match=r"1 of another shape\n  of another shape: head.fc.weight .*complex64"):
        vmamba.load_checkpoint(model, tmp_path / "complex.pth")
    torch.save(state, tmp_path / "plain.pth")
    other = vmamba.create_model("vmamba_femto_s2", num_classes=3, d_state=2)
    with pytest.raises(
        CheckpointError,
        match=r"of another shape\nThe file is of a network with d_state=1, not 2\.\n  of another shape: ",
    ) as caught:
        vmamba.load_checkpoint(other, tmp_path / "plain.pth")
    assert "another variant" not in str(caught.value)
