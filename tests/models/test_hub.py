"""Models in folders, for timm, transformers, the Hugging Face Hub and back again."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from models.hubs import serving
from models.loading import SMALL
from safetensors.torch import load_file, save_file

import vmamba
from vmamba.errors import CheckpointError, CheckpointNotFoundError, HubError
from vmamba.models.checkpoints import read_metadata, save_checkpoint
from vmamba.models.hub import push_to_hub, save_folder
from vmamba.models.model_card import CardFacts, model_card
from vmamba.models.registry import load_model
from vmamba.models.segmentation import UPerNet

NAMES = ["ant", "bee", "树"]


def sample(model: Any, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(1, model.in_chans, height, width)


def outputs(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(images)
    return [found] if isinstance(found, torch.Tensor) else [value for one in found for value in one.values()]


def assert_same(model: Any, again: Any) -> None:
    images = sample(model)
    ours, theirs = outputs(model, images), outputs(again, images)
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def classifier() -> Any:
    return vmamba.create_model("vmamba_femto_s2", num_classes=3).eval()


@pytest.fixture
def folder(classifier: Any, tmp_path: Path) -> Path:
    save_folder(classifier, tmp_path / "ants", {"class_names": NAMES})
    return tmp_path / "ants"


def changed(folder: Path, **values: Any) -> str:
    """The name of a folder whose configuration was changed."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return f"local-dir:{folder}"


# --- There and back ---------------------------------------------------------------------------------------------------

DENSE = {
    "upernet_vmamba_femto_s2": {"channels": 16, "auxiliary_channels": 0},
    "upernet": {"backbone": "resnet18", "channels": 16, "out_norm": False},
    "maskrcnn_vmamba_femto_s2": {"channels": 16, "hidden": 32},
    "maskrcnn": {"backbone": "resnet18", "channels": 16, "hidden": 32, "masks": False},
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_come_back_to_the_bit(name: str, tmp_path: Path) -> None:
    model: Any = vmamba.create_model(name, num_classes=3, **DENSE[name]).eval()
    model.score_thr = 0.0  # so that a detector without training finds something
    metadata = {"class_names": NAMES, "category_ids": [1, 5, 9], "sides": [64, 96], "mean": [0.1, 0.2, 0.3]}
    save_folder(model, tmp_path, metadata)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["label_names"], config["category_ids"]) == (name, NAMES, [1, 5, 9])
    again: Any = vmamba.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    again.score_thr = 0.0
    assert_same(model, again)
    assert (again.pretrained_cfg["mean"], again.variant) == ([0.1, 0.2, 0.3], name)
    rebuilt, known = load_model(f"local-dir:{tmp_path}")
    rebuilt.score_thr = 0.0  # type: ignore[assignment]
    assert_same(model, rebuilt)
    assert [known[key] for key in ("class_names", "category_ids", "sides")] == [NAMES, [1, 5, 9], [64, 96]]
    assert rebuilt.img_size == (64, 96)  # as it was trained, whatever its variant is meant for


def test_a_dense_model_starts_anew_where_the_caller_says_so(tmp_path: Path) -> None:
    model: Any = vmamba.create_model("upernet_vmamba_femto_s2", num_classes=3, channels=16, auxiliary_channels=8)
    save_folder(model, tmp_path)
    other: Any = vmamba.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5, in_chans=1)
    assert outputs(other.eval(), sample(other))[0].shape[1] == 5
    mine, theirs = model.state_dict(), other.state_dict()
    assert torch.equal(mine["decode_head.bottleneck.conv.weight"], theirs["decode_head.bottleneck.conv.weight"])
    fresh = vmamba.create_model(f"local-dir:{tmp_path}")  # without pretrained, as with timm: the network alone
    assert not torch.equal(
        fresh.state_dict()["decode_head.bottleneck.conv.weight"], mine["decode_head.bottleneck.conv.weight"]
    )


@pytest.mark.parametrize("pattern", ["diagonal", ["cross", "spiral"]])
def test_a_classifier_keeps_its_pattern_and_its_changes(pattern: Any, tmp_path: Path) -> None:
    model: Any = vmamba.create_model(SMALL, num_classes=3, in_chans=4, dims=(16, 24), depths=(1, 1), pattern=pattern)
    save_folder(model.eval(), tmp_path, {"class_names": NAMES, "mean": [0.5] * 4, "std": [0.5] * 4})
    assert_same(model, vmamba.create_model(f"local-dir:{tmp_path}", pretrained=True).eval())
    assert_same(model, load_model(f"local-dir:{tmp_path}")[0])
    assert_same(model, timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval())


def test_the_weights_hold_all_that_prediction_needs(folder: Path) -> None:
    told = read_metadata(folder / "model.safetensors")
    assert (told["variant"], told["class_names"], told["num_classes"]) == ("vmamba_femto_s2", NAMES, 3)


def test_what_timm_wrote_is_read_and_what_we_write_timm_reads(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=3).eval()
    timm.models.save_for_hf(
        model, str(tmp_path / "theirs"), model_config={"label_names": NAMES}, safe_serialization=True
    )
    again, known = load_model(f"local-dir:{tmp_path / 'theirs'}")
    assert_same(model_with_chans(model), again)
    assert (known["class_names"], known["variant"], again.num_classes) == (NAMES, "resnet18", 3)
    assert "state_dict" not in again.pretrained_cfg
    features = vmamba.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True, features_only=True)
    assert [tuple(x.shape[1:]) for x in features(torch.zeros(1, 3, 64, 64))][-1] == (512, 2, 2)
    other = vmamba.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True, num_classes=7, in_chans=1)
    assert other.eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 7)
    save_folder(model, tmp_path / "ours", {"class_names": NAMES})
    assert_same(model_with_chans(model), timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval())


def model_with_chans(model: Any) -> Any:
    model.in_chans = 3
    return model


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_weights_of_torch_are_read_without_running_them(name: str, classifier: Any, folder: Path) -> None:
    torch.save(classifier.state_dict(), folder / name)
    (folder / "model.safetensors").unlink()
    assert_same(classifier, vmamba.create_model(f"local-dir:{folder}", pretrained=True).eval())


def test_a_grey_network_is_written_without_being_told_its_mean(tmp_path: Path) -> None:
    model = vmamba.create_model("vmamba_femto", num_classes=3, in_chans=1).eval()
    save_folder(model, tmp_path)
    again, known = load_model(tmp_path)
    assert known["mean"] == [pytest.approx((0.485 + 0.456 + 0.406) / 3)]
    assert known["std"] == [pytest.approx((0.229 + 0.224 + 0.225) / 3)]
    assert_same(model, again)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")

    def __init__(self, mark: str) -> None:
        self.mark = mark


@pytest.mark.parametrize("name", ["vmamba_femto_s2", "resnet18"])
def test_a_pickle_that_asks_for_code_is_refused(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=3)
    save_folder(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    mark = tmp_path / "ran"
    for content in (pickle.dumps(Hostile(str(mark))), None):
        if content is None:
            torch.save({"weight": torch.zeros(1), "x": Hostile(str(mark))}, tmp_path / "pytorch_model.bin")
        else:
            (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError):
            vmamba.create_model(f"local-dir:{tmp_path}", pretrained=True)
        assert not mark.exists()


@pytest.mark.parametrize("name", ["vmamba_femto_s2", "resnet10t"])
def test_what_transformers_has_trained_is_read(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_folder(timm.create_model(name, num_classes=3), tmp_path / "ours", {"class_names": NAMES})
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        wrapped.timm_model.get_classifier().weight.add_(1)
    wrapped.save_pretrained(tmp_path / "theirs")
    again, known = load_model(f"local-dir:{tmp_path / 'theirs'}")
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(images), wrapped(images).logits)
    assert (known["class_names"], known["num_classes"]) == (NAMES, 3)


# --- What is no such folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pretrained", [True, False])
def test_what_is_no_folder_of_a_model_says_so(pretrained: bool, folder: Path, tmp_path: Path) -> None:
    def told(name: str) -> str:
        with pytest.raises(CheckpointError) as caught:
            vmamba.create_model(name, pretrained=pretrained)
        return str(caught.value)

    assert "'nowhere' does not exist. Expected a folder with config.json" in told("local-dir:nowhere")
    assert "is a file; name the folder it is in" in told(f"local-dir:{folder / 'config.json'}")
    assert "there is no config.json" in told(f"local-dir:{tmp_path}")
    for text in ("", "{", '{"a": ' * 100_000, "\xff"):
        (folder / "config.json").write_bytes(text.encode("latin1"))
        assert "cannot be read as JSON" in told(f"local-dir:{folder}")
    for text in ("[]", "3", '{"model_args": 3}', '{"architecture": "vmamba_femto_s2", "pretrained_cfg": []}'):
        (folder / "config.json").write_text(text)
        assert "is not the configuration of a model" in told(f"local-dir:{folder}")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert "no \"architecture\" of timm's or ours, but a model of another library, 'bert'." in told(
        f"local-dir:{folder}"
    )
    (folder / "config.json").write_text('{"architecture": "vmamba_of_tomorrow"}')
    assert "'vmamba_of_tomorrow', which neither this package nor timm knows" in told(f"local-dir:{folder}")
    (folder / "config.json").write_text("{" + " " * (1 << 24) + "}")
    assert "it has more than 16,777,216 bytes" in told(f"local-dir:{folder}")


def test_weights_that_are_missing_or_cut_short_or_of_another_model(folder: Path, tmp_path: Path) -> None:
    name, weights = f"local-dir:{folder}", folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=re.escape(str(weights))):
            vmamba.create_model(name, pretrained=True)
    for tensors in ({"a": torch.zeros(2)}, timm.create_model("resnet18", num_classes=3).state_dict()):
        save_file(tensors, weights)
        with pytest.raises(CheckpointError):
            vmamba.create_model(name, pretrained=True)
    weights.unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"has a config\.json, but no weights beside it"):
        vmamba.create_model(name, pretrained=True)
    save_folder(timm.create_model("resnet18", num_classes=3), other := tmp_path / "resnet")
    state = load_file(other / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)does not fit resnet18: .*layer1\.0\.conv1\.weight"):
        vmamba.create_model(f"local-dir:{other}", pretrained=True)


HOSTILE: list[dict[str, Any]] = [
    {"model_args": {"depths": [10**6, 1]}},
    {"model_args": {"dims": [10**9, 1, 1, 1]}},
    {"model_args": {"checkpoint_path": "/etc/passwd"}},
    {"model_args": {"pretrained_cfg": {"file": "/etc/passwd"}}},
    {"model_args": {"features_only": True}},
    {"model_args": {"device": "cuda"}},
    {"model_args": {"unheard_of": 1}},
    {"model_args": {"pattern": "os.system"}},
    {"num_classes": 10**12},
    {"num_classes": "many"},
    {"label_names": [["a"]]},
    {"pretrained_cfg": {"unheard_of": 1}},
    {"pretrained_cfg": {"mean": ["a"]}},
    {"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}},
]


@pytest.mark.parametrize("values", HOSTILE, ids=str)
def test_a_configuration_that_asks_for_more_than_a_network(values: dict[str, Any], folder: Path) -> None:
    name = changed(folder, **values)
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        vmamba.create_model(name, pretrained=True)


@pytest.mark.parametrize("backbone", ["hf-hub:ada/evil", "local-dir:/etc", "no_such_model", 3])
def test_a_backbone_is_a_models_name_and_not_a_place(backbone: Any, tmp_path: Path) -> None:
    model: Any = vmamba.create_model("upernet", backbone="resnet18", num_classes=3, channels=16)
    save_folder(model, tmp_path)
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    for pretrained in (True, False):
        with pytest.raises(CheckpointError, match=r"its backbone is .*, which is no model's name"):
            vmamba.create_model(changed(tmp_path, model_args=arguments | {"backbone": backbone}), pretrained=pretrained)
    save_checkpoint(
        model, file := tmp_path / "one.safetensors", {"model_kwargs": {"backbone": backbone, "channels": 16}}
    )
    with pytest.raises(CheckpointError, match=r"its backbone is .*, which is no model's name"):
        load_model(file)


@pytest.mark.parametrize("backbone", ["vmamba_femto_s2", "resnet18"])
def test_a_dense_model_on_a_folders_backbone_is_made_again_by_name(backbone: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"pattern": "diagonal"} if backbone.startswith("vmamba") else {}
    source: Any = (vmamba.create_model if changes else timm.create_model)(backbone, num_classes=3, **changes)
    save_folder(source, tmp_path / "backbone")
    place = f"local-dir:{tmp_path / 'backbone'}"
    model: Any = vmamba.create_model("upernet", backbone=place, num_classes=3, channels=16, pretrained_backbone=True)
    weights = source.state_dict()
    inside = {key: value for key, value in model.backbone.state_dict().items() if value.ndim > 3}
    assert inside
    assert all(any(torch.equal(value, other) for other in weights.values()) for value in inside.values())
    save_folder(model.eval(), tmp_path / "whole", {"class_names": NAMES})
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["model_args"].items() >= {"backbone": backbone, **changes}.items()
    shutil.rmtree(tmp_path / "backbone")
    for again in (
        load_model(tmp_path / "whole/model.safetensors")[0],
        vmamba.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True).eval(),
    ):
        assert_same(model, again)
    with pytest.raises(CheckpointError, match="holds upernet, a model for segmentation; a backbone is a classifier"):
        vmamba.create_model("upernet", backbone=f"local-dir:{tmp_path / 'whole'}")


def test_a_variants_dense_model_on_another_backbone_is_made_again(tmp_path: Path) -> None:
    model: Any = vmamba.create_model("upernet_vmamba_tiny_s1l8", backbone="resnet18", num_classes=3, channels=16)
    save_checkpoint(model.eval(), tmp_path / "model.safetensors")
    assert_same(model, load_model(tmp_path / "model.safetensors")[0])


def test_where_weights_are_is_not_the_configurations_to_say(classifier: Any, folder: Path, tmp_path: Path) -> None:
    elsewhere = vmamba.create_model("vmamba_femto_s2", num_classes=3)
    save_folder(elsewhere, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    evil = {"file": str(tmp_path / "other/model.safetensors"), "url": "http://localhost:1/x", "source": "file",
            "hf_hub_id": "a/b", "custom_load": True}  # fmt: skip
    name = changed(folder, pretrained_cfg=config | evil)
    assert_same(classifier, vmamba.create_model(name, pretrained=True).eval())
    name = changed(folder, pretrained_cfg=config | {"hf_hub_filename": "../other/model.safetensors"})
    with pytest.raises(CheckpointError, match="names a file outside itself"):
        vmamba.create_model(name, pretrained=True)


def test_models_that_no_name_makes_again_are_refused(tmp_path: Path) -> None:
    for model in (
        torch.nn.Linear(2, 2),
        vmamba.create_model(SMALL, features_only=True),
        timm.create_model("resnet18", features_only=True),
        vmamba.VMamba(depths=(1, 1), dims=(16, 32)),
    ):
        with pytest.raises(CheckpointError, match="cannot be made again from a name"):
            save_folder(model, tmp_path / "x")
    backbone = vmamba.create_model(SMALL, features_only=True)
    with pytest.raises(CheckpointError, match="cannot be made again from a name"):
        save_folder(UPerNet(backbone, 3, channels=16), tmp_path / "x")

    def pattern(height: int, width: int) -> None:
        """One that no name was registered for."""

    with pytest.raises(CheckpointError, match="register it by a name"):
        save_folder(vmamba.create_model(SMALL, num_classes=3), tmp_path / "x", {"model_kwargs": {"pattern": pattern}})
    assert not (tmp_path / "x").exists()


def test_a_full_disk_leaves_what_was_there(classifier: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_folder(vmamba.create_model("vmamba_femto_s2", num_classes=3), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- Grey classifiers for those who read in RGB -----------------------------------------------------------------------


def test_a_grey_classifier_in_rgb_computes_the_same(tmp_path: Path) -> None:
    model: Any = vmamba.create_model("vmamba_femto", num_classes=3, in_chans=1).eval()
    save_folder(model, tmp_path, {"class_names": NAMES, "mean": [0.3], "std": [0.4]}, rgb=True)
    again: Any = vmamba.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(again(images.expand(-1, 3, -1, -1)), model(images))
    assert (again.in_chans, again.pretrained_cfg["mean"], again.pretrained_cfg["std"]) == (3, [0.3] * 3, [0.4] * 3)
    colours = torch.rand(1, 3, 28, 28)
    grey = (colours * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(again(colours), model(grey), atol=1e-4, rtol=1e-3)
    assert "It sees no colour." in (tmp_path / "README.md").read_text()
    with pytest.raises(CheckpointError, match="rgb is for classifiers of grey pictures"):
        save_folder(again, tmp_path, rgb=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_grey_classifier_of_timms_in_rgb_is_for_the_same_size(name: str, tmp_path: Path) -> None:
    size = {"img_size": 64} if name == "test_vit" else {}
    save_checkpoint(timm.create_model(name, num_classes=3, in_chans=1, **size), file := tmp_path / "grey.safetensors",
                    {"img_size": [64, 64], "mean": [0.3], "std": [0.4]})  # as training does  # fmt: skip
    model, metadata = load_model(file)
    save_folder(model, tmp_path / "rgb", metadata, rgb=True)
    for source in (f"local-dir:{tmp_path / 'rgb'}", tmp_path / "rgb/model.safetensors"):
        again, told = load_model(source)
        assert (again.pretrained_cfg["input_size"][-2:], told["img_size"], told["in_chans"]) == ((64, 64), [64, 64], 3)
        assert "input_size" not in told
        images = torch.randn(2, 1, 64, 64)
        torch.testing.assert_close(again(images.expand(-1, 3, -1, -1)), model(images), atol=1e-4, rtol=1e-3)


# --- The card ---------------------------------------------------------------------------------------------------------


def header(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_a_card_says_what_is_known_and_nothing_else(classifier: Any) -> None:
    bare = model_card(classifier, None, CardFacts("ants"))
    assert header(bare) == {
        "library_name": "timm", "pipeline_tag": "image-classification",
        "tags": ["image-classification", "vision", "vmamba", "timm", "transformers"],
    }  # fmt: skip
    assert not re.search(r"^## (Data|Results|Recipe)$", bare, re.MULTILINE)
    assert "No scores of it are known." in bare
    assert "No licence is named" in bare
    assert "%" not in bare

    recipe = {
        "model": {"name": "vmamba_femto_s2", "pretrained": False, "checkpoint": "/home/ada/old.safetensors"},
        "data": {"root": "/home/ada/insects/", "dataset": "", "batch_size": 8, "val_root": r"C:\Users\ada\val"},
        "optim": {"epochs": 4, "optimizer": "muon", "lr": 0.01, "ema_decay": 0},
        "run": "/home/ada/runs/x", "seed": 3,
    }  # fmt: skip
    results = {"top1": 0.75, "top5": 1.0, "images": 8, "data": "/home/ada/insects/val",
               "per_class": {"ant": 0.9, "bee": 0.5, "树": 0.8}}  # fmt: skip
    metadata = {"class_names": NAMES, "epoch": 4, "val_top1": 0.25}
    facts = CardFacts("ants", "ada/ants", "apache-2.0", None, recipe, results)
    card = model_card(classifier, metadata, facts)
    assert "home" not in card
    assert "Users" not in card
    told = header(card)
    assert (told["license"], told["metrics"]) == ("apache-2.0", ["accuracy"])
    (entry,) = told["model-index"]
    assert entry["name"] == "ants"
    (result,) = entry["results"]
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"name": "insects", "type": "insects", "split": "validation"}
    assert result["metrics"] == [{"type": "accuracy", "value": 0.75, "name": "top-1 accuracy"}]
    for line in (
        "with 3 classes: ant, bee, 树.", "Trained on insects.", "On the validation images of insects, 8 of them:",
        "| top-1 accuracy | 75.00% |", "| bee | 50.0% |", "| initial weights | a file of weights |", "| epochs | 4 |",
        "| moving average of the weights | none |", "- It is weakest at bee (accuracy 50.0%).",
        "vmamba predict photo.jpg --checkpoint hf-hub:ada/ants",
    ):  # fmt: skip
        assert line in card, line
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert settings["optim"] == recipe["optim"]
    assert settings["data"]["root"] == "insects"

    of_epoch = model_card(classifier, metadata, CardFacts("ants"))
    assert "at the end of epoch 4" in of_epoch
    assert "| top-1 accuracy | 25.00% |" in of_epoch
    assert "model-index" not in header(of_epoch)  # of data that nobody has named


@pytest.mark.parametrize(
    ("dataset", "name", "hub"),
    [("hfds/cifar10", "cifar10", ["cifar10"]), ("hfds/ada/insects", "ada/insects", ["ada/insects"]),
     ("torch/fashion_mnist", "fashion_mnist", None), ("hfds//home/ada/insects", "insects", None)],
)  # fmt: skip
def test_data_of_the_hub_is_linked(dataset: str, name: str, hub: Any, classifier: Any) -> None:
    card = model_card(classifier, None, CardFacts("ants", recipe={"data": {"dataset": dataset}}))
    assert header(card).get("datasets") == hub
    assert (
        f"Trained on [{name}](https://huggingface.co/datasets/{name})." in card
        if hub
        else f"Trained on {name}." in card
    )
    assert "home" not in card


def test_names_of_classes_do_not_become_markup(classifier: Any) -> None:
    names = ["a|b", "<img src=x>", "`c`\n# d"]
    card = model_card(
        classifier,
        {"class_names": names},
        CardFacts("x", results={"top1": 0.5, "per_class": dict.fromkeys(names, 0.5)}),
    )
    assert r"a\|b, \<img src=x\>, \`c\` # d." in card
    assert "\n# d" not in card


def test_the_card_of_another_of_timms_models_tells_its_size() -> None:
    model = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay={"input_size": (3, 96, 96)})
    card = model_card(model, {"class_names": NAMES, "crop_pct": 0.75}, CardFacts("x"))
    for line in ("multiply-accumulates at 96×96", "torch.zeros(1, 3, 96, 96)", "128 pixels", "The middle 96×96 is"):
        assert line in card, line
    card = model_card(model, {"class_names": NAMES, "crop_pct": 0.75, "crop_mode": "squash"}, CardFacts("x"))
    assert "The picture is squashed to 128×128" in card


@pytest.mark.parametrize("name", DENSE)
def test_the_snippet_on_a_card_runs(name: str, tmp_path: Path) -> None:
    model = vmamba.create_model(name, num_classes=3, img_size=64, **DENSE[name])
    save_folder(model, tmp_path, {"class_names": NAMES})
    card = (tmp_path / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    values: dict[str, Any] = {}
    exec(snippet.replace(f"hf-hub:OWNER/{tmp_path.name}", f"local-dir:{tmp_path}"), values)
    found = values["found"]
    assert (
        found.shape == (1, 3, 64, 64)
        if model.task == "segmentation"
        else {"boxes", "scores", "labels"} <= set(found[0])
    )
    told = header(card)
    pipeline = "image-segmentation" if model.task == "segmentation" else "object-detection"
    assert (told["pipeline_tag"], told["library_name"]) == (pipeline, "vmamba")
    assert ("instance-segmentation" in told["tags"]) == (name == "maskrcnn_vmamba_femto_s2")
    assert ("NeurIPS" in card or "bibtex" in card) == ("vmamba" in name)


def test_a_card_that_somebody_wrote_stays(classifier: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert save_folder(classifier, tmp_path) == ["model.safetensors", "config.json"]
    assert (tmp_path / "README.md").read_text() == "mine"


# --- The hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub on this machine with what its argument maps names to."""
    import huggingface_hub.constants as constants

    folders: dict[str, Path] = {}
    with serving(folders) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield folders


def test_a_model_on_the_hub_is_fetched_and_read(hub: Any, classifier: Any, folder: Path, tmp_path: Path) -> None:
    hub["ada/ants"] = folder
    for name in ("hf-hub:ada/ants", "hf-hub:ada/ants@v1", "hf_hub:ada/ants"):
        assert_same(classifier, vmamba.create_model(name, pretrained=True).eval())
    model, known = load_model("hf-hub:ada/ants")
    assert_same(classifier, model)
    assert known["class_names"] == NAMES
    dense: Any = vmamba.create_model("upernet_vmamba_femto_s2", num_classes=3, channels=16).eval()
    save_folder(dense, tmp_path / "dense")
    hub["ada/dense"] = tmp_path / "dense"
    kept = tmp_path / "kept"
    assert_same(dense, vmamba.create_model("hf-hub:ada/dense", pretrained=True, cache_dir=str(kept)).eval())
    assert list(kept.rglob("model.safetensors"))
    torch.save(classifier.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub["ada/old"] = folder
    assert_same(classifier, vmamba.create_model("hf-hub:ada/old", pretrained=True).eval())


def test_what_the_hub_does_not_have_is_told(hub: Any, folder: Path, tmp_path: Path) -> None:
    hub["ada/ants"], hub["ada/empty"] = folder, tmp_path / "empty"
    (tmp_path / "empty").mkdir()
    for name, reason in {
        "hf-hub:ada/nothing": "cannot fetch config.json of hf-hub:ada/nothing: ",
        "hf-hub:ada/ants@v7": "cannot fetch config.json of hf-hub:ada/ants@v7: ",
        "hf-hub:no such name!": "cannot fetch config.json of hf-hub:no such name!: ",
        "hf-hub:ada/empty": "holds no model: there is no config.json",
    }.items():
        with pytest.raises(CheckpointError, match=re.escape(reason)):
            vmamba.create_model(name, pretrained=True)


def test_without_a_network_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="the hub cannot be reached, and the file is not in the cache"):
        vmamba.create_model("hf-hub:ada/ants", pretrained=True)


class Api:
    """Stands for `huggingface_hub.HfApi`: notes what it is asked for."""

    has_card = False
    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, **options: Any) -> None:
        type(self).calls = [("", options)]

    def create_repo(self, name: str, **options: Any) -> Any:
        self.calls.append(("create_repo", options))
        return SimpleNamespace(repo_id=name if "/" in name else f"ada/{name}")

    def file_exists(self, name: str, file: str, **options: Any) -> bool:
        self.calls.append(("file_exists", {"name": name, "file": file, **options}))
        return self.has_card

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload_folder", options))
        return SimpleNamespace(pr_url=None, commit_url="https://hub/ada/ants/commit/1")


@pytest.mark.parametrize("has_card", [False, True])
def test_a_folder_is_uploaded_and_nothing_else(has_card: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(Api, "has_card", has_card)
    (folder / "private.txt").write_text("mine")
    assert push_to_hub(folder, "ants", token="secret", private=True, revision="v2") == "https://hub/ada/ants/commit/1"
    made, created, asked, uploaded = Api.calls
    assert made[1] == {"token": "secret", "library_name": "vmamba"}
    assert created[1] == {"private": True, "exist_ok": True}
    assert asked[1] == {"name": "ada/ants", "file": "README.md", "revision": "v2"}
    files = ["config.json", "model.safetensors", "README.md"]
    assert uploaded[1] == {
        "repo_id": "ada/ants", "folder_path": str(folder), "allow_patterns": files[:2] if has_card else files,
        "revision": "v2", "create_pr": False, "commit_message": "Add model",
    }  # fmt: skip


def test_what_cannot_be_uploaded_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    Api.calls = []
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        push_to_hub(tmp_path, "ada/ants")
    monkeypatch.setattr(Api, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("401: who are you?")))
    with pytest.raises(HubError, match=r"ada/ants could not be uploaded: 401: who are you\?. Check"):
        push_to_hub(folder, "ada/ants")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles are not uploaded"):
        push_to_hub(folder, "ada/ants")
