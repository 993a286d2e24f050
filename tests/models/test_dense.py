from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from models.dense import layouts, write_openmmlab
from models.loading import assert_equal, assert_refused_unchanged
from models.released import as_later, older, prefixed, theirs
from timm.optim import create_optimizer_v2

import vmamba
from vmamba.models import registry
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.class_names import ADE20K, COCO, COCO_CATEGORY_IDS
from vmamba.models.complexity import profile
from vmamba.models.registry import ENTRIES, load_model

MODELS = layouts()["models"]


def on_meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return vmamba.create_model(name)


@pytest.mark.parametrize("name", MODELS)
def test_layout_is_the_published_one(name: str) -> None:
    model, layout = on_meta(name), MODELS[name]
    assert sum(p.numel() for p in model.parameters()) == layout["parameters"] == ENTRIES[name].params
    inside = "backbone.extractor.model."
    ours = model.state_dict()
    backbone = theirs({key.removeprefix(inside): tensor for key, tensor in ours.items() if key.startswith(inside)})
    renamed = {f"backbone.{key}": tensor for key, tensor in backbone.items()}
    renamed |= {key: tensor for key, tensor in ours.items() if not key.startswith(inside)}
    shapes = {key: list(tensor.shape) for key, tensor in renamed.items()}
    assert shapes == {key: shape for key, shape, *_ in layout["keys"]} | {key: [] for key in layout["integer_keys"]}


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_the_published_ones(name: str) -> None:
    published = ENTRIES[name].flops
    if name == "maskrcnn_vmamba_small_s2l15":
        assert published == 384
        published = 348  # where the table has 384: two digits changed places, as the other rows show
    assert profile(on_meta(name)).flops / 1e9 == pytest.approx(published, rel=4e-3)


def test_every_published_file_has_a_name_and_its_numbers() -> None:
    suffixes = {"160k": "", "MaskRCNN@1x": "", "MaskRCNN@3x": "_3x", "MaskRCNN@1x bs8": "_bs8"}
    count = 0
    for name, layout in MODELS.items():
        for released in layout["released"]:
            entry = ENTRIES[name + suffixes[released["schedule"]]]
            tag = released["tag"].replace("#", "%23")
            assert entry.url == f"https://github.com/MzeroMiko/VMamba/releases/download/{tag}/{released['file']}"
            assert entry.flops == released["flops_G"]
            scores = ("mIoU_ss", "mIoU_ms") if entry.task == "segmentation" else ("box_AP", "mask_AP")
            assert list(entry.published.values()) == [released[score] for score in scores]
            count += 1
    assert count == 20
    published = [entry.url for entry in ENTRIES.values() if entry.task != "classification" and entry.url]
    assert len(set(published)) == len(published) == 20
    for task, first in (("segmentation", "upernet_vmamba_tiny_s1l8"), ("detection", "maskrcnn_vmamba_tiny_s1l8")):
        assert vmamba.list_models(task)[0] == first
    with pytest.raises(RuntimeError, match="upernet_vmamba_nano has no published weights"):
        vmamba.create_model("upernet_vmamba_nano", pretrained=True)


def test_class_names() -> None:
    numbers = layouts()
    assert [name.strip() for name in numbers["upernet"]["class_names"]] == list(ADE20K)
    assert numbers["maskrcnn"]["class_names"] == list(COCO)
    assert numbers["maskrcnn"]["category_ids"] == list(COCO_CATEGORY_IDS)
    assert on_meta("maskrcnn_vmamba_femto").class_names == COCO
    assert vmamba.create_model("maskrcnn_vmamba_femto", num_classes=3, channels=8, hidden=8).class_names is None


def small(family: str, **options: Any) -> torch.nn.Module:
    narrow = {"channels": 8, "hidden": 16} if family == "maskrcnn" else {"channels": 8, "auxiliary_channels": 4}
    return vmamba.create_model(f"{family}_vmamba_femto_s2", **narrow, **options)


@pytest.mark.parametrize("family", ["upernet", "maskrcnn"])
def test_files_of_mmsegmentation_and_mmdetection_are_known(family: str, tmp_path: Path) -> None:
    model = small(family, num_classes=5)
    inside = "backbone.extractor.model."
    backbone = {k.removeprefix(inside): t for k, t in model.state_dict().items() if k.startswith(inside)}
    heads = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(inside)}
    for i, rename in enumerate((theirs, older, lambda state: as_later(theirs(state)))):
        path = write_openmmlab(tmp_path / f"{i}.pth", heads | prefixed("backbone.", rename(backbone)))
        info = vmamba.identify_checkpoint(path)
        assert (info.task, info.variant, info.num_classes) == (model.task, "vmamba_femto_s2", 5)
        assert info.format == {"upernet": "mmsegmentation", "maskrcnn": "mmdetection"}[family]
        other = small(family, num_classes=5)
        vmamba.load_checkpoint(other, path)
        assert_equal(other, model.state_dict())

    words = "The file is for 5 classes, the model for 4", "num_classes=5", "reset_head=True"
    assert_refused_unchanged(small(family, num_classes=4), path, *words)
    other = small(family, num_classes=4)
    vmamba.load_checkpoint(other, path, reset_head=True)
    assert torch.equal(other.backbone.outnorm1.weight, model.backbone.outnorm1.weight)
    assert_refused_unchanged(vmamba.create_model(f"{family}_vmamba_femto"), path, "another variant, vmamba_femto_s2")
    missing = {key: tensor for key, tensor in heads.items() if key != "backbone.outnorm1.bias"}
    path = write_openmmlab(tmp_path / "missing.pth", missing | prefixed("backbone.", theirs(backbone)))
    assert_refused_unchanged(small(family, num_classes=5), path, "missing: backbone.outnorm1.bias (96,)")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("upernet_vmamba_femto_s2", {"channels": 8, "auxiliary_channels": 4, "num_classes": 3, "in_chans": 1}),
        ("upernet_vmamba_femto_s2", {"channels": 8, "auxiliary_channels": 0}),
        ("maskrcnn_vmamba_femto_s2", {"channels": 8, "hidden": 16, "num_classes": 3, "img_size": 64}),
        ("maskrcnn_vmamba_femto_s2", {"channels": 8, "hidden": 16, "masks": False}),
        ("upernet", {"backbone": "resnet18", "channels": 8, "out_norm": False, "num_classes": 6}),
        ("maskrcnn", {"backbone": "vmamba_femto", "channels": 8, "hidden": 16, "drop_path_rate": 0.1}),
    ],
)
def test_a_file_rebuilds_the_model(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = vmamba.create_model(name, **options).eval()
    published = {"segmentation": ADE20K, "detection": COCO}[model.task]
    save_checkpoint(model, path := tmp_path / "model.safetensors")
    names = load_model(path)[1].get("class_names")
    assert names == (None if "num_classes" in options else list(published))
    names = [f"class {i}" for i in range(model.num_classes)]
    save_checkpoint(model, path := tmp_path / "model.safetensors", {"class_names": names})
    rebuilt, metadata = load_model(path)
    assert_equal(rebuilt, model.state_dict())
    assert metadata["class_names"] == names
    assert (rebuilt.variant, rebuilt.num_classes, rebuilt.img_size) == (name, model.num_classes, model.img_size)
    assert vmamba.identify_checkpoint(path).task == model.task
    images = torch.randn(1, model.in_chans, 48, 64)
    with torch.inference_mode():
        torch.testing.assert_close(rebuilt(images), model(images), atol=0.0, rtol=0.0)


def test_published_files_serve_other_classes_and_fewer_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = small("maskrcnn")
    path = write_openmmlab(tmp_path / "published.pth", published.state_dict())
    monkeypatch.setattr(registry, "download", lambda url: path)
    name = "maskrcnn_vmamba_femto_s2"
    monkeypatch.setitem(ENTRIES, name, dataclasses.replace(ENTRIES[name], url="https://example.org/file.pth"))
    assert_equal(small("maskrcnn", pretrained=True), published.state_dict())
    model = small("maskrcnn", pretrained=True, num_classes=3, masks=False, in_chans=1)
    assert model.roi_head.bbox_head.fc_cls.weight.shape == (4, 16)
    assert torch.equal(model.neck.fpn_convs[0].conv.weight, published.neck.fpn_convs[0].conv.weight)
    first = "backbone.extractor.model.stem.conv1.weight"
    summed = published.get_parameter(first).sum(1, keepdim=True)
    torch.testing.assert_close(model.get_parameter(first), summed)


def test_decay_and_checkpointing_reach_the_backbone() -> None:
    model = small("upernet", num_classes=3)
    without = model.no_weight_decay()
    assert "backbone.extractor.model.stages.0.blocks.0.ss2d.A_log" in without
    assert without <= {name for name, _ in model.named_parameters()}
    model.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in model.backbone.extractor.model.stages)


@pytest.mark.parametrize("family", ["upernet", "maskrcnn"])
def test_rates_by_layer_are_those_of_the_classifier_and_whole_for_the_heads(family: str) -> None:
    def scales(model: Any) -> dict[str, float]:
        names = {id(p): name for name, p in model.named_parameters()}
        groups = create_optimizer_v2(model, "sgd", lr=1.0, layer_decay=0.75).param_groups
        return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}

    inside = "backbone.extractor.model."
    dense, classifier = scales(on_meta(f"{family}_vmamba_tiny_s1l8")), scales(on_meta("vmamba_tiny_s1l8"))
    backbone = {key.removeprefix(inside): scale for key, scale in dense.items() if key.startswith(inside)}
    assert backbone == {key: classifier[key] for key in backbone}
    assert {scale for key, scale in dense.items() if not key.startswith(inside)} == {1.0}


def test_backbones_of_timm_have_rates_by_layer_where_they_are_kept_whole() -> None:
    with torch.device("meta"):
        vit, resnet = (vmamba.create_model("upernet", backbone=name) for name in ("test_vit", "test_resnet"))
    group = vit.group_matcher()
    inside = "backbone.extractor.model."
    layers = ("patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.5.norm1.weight")
    assert [group(inside + name) for name in layers] == [0, 1, 6]
    assert group("decode_head.conv_seg.weight") == group("backbone.outnorm0.weight") == 7
    with pytest.raises(ValueError, match=r"the layers of FeatureListNet are in no known order"):
        resnet.group_matcher()
