"""Weight files of every layout: told apart, loaded whole or not at all; and our own, from which models are rebuilt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from models.loading import SMALL, State, assert_equal, assert_refused_unchanged, small, vanilla
from models.released import as_later, older, prefixed, theirs, write_released
from timm.utils import ModelEmaV3
from torch import nn

import vmamba
from vmamba import create_model, identify_checkpoint, load_checkpoint
from vmamba.errors import CheckpointError
from vmamba.models.checkpoints import read_metadata, save_checkpoint
from vmamba.models.registry import load_model
from vmamba.models.variants import VARIANTS

# --- Formats ---------------------------------------------------------------------------------------------------------


def released(path: Path, state: State) -> None:
    write_released(path, theirs(state))


def released_long_ago(path: Path, state: State) -> None:
    write_released(path, theirs(state), _use_new_zipfile_serialization=False)


def released_older_names(path: Path, state: State) -> None:
    write_released(path, older(state))


def released_later_shapes(path: Path, state: State) -> None:
    write_released(path, as_later(theirs(state)))


def bare_released_names(path: Path, state: State) -> None:
    torch.save(theirs(state), path)


def bare(path: Path, state: State) -> None:
    torch.save(state, path)


def parallel_and_compiled(path: Path, state: State) -> None:
    torch.save({"model": prefixed("module._orig_mod.", state), "epoch": 1}, path)


def lightning(path: Path, state: State) -> None:
    weights = prefixed("model.", state) | {"metric.total": torch.zeros(3)}
    optimizer = [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}]
    contents = {"pytorch-lightning_version": "2.5.0", "epoch": 3, "state_dict": weights, "optimizer_states": optimizer}
    torch.save(contents, path)


def bare_safetensors(path: Path, state: State) -> None:
    safetensors.torch.save_file(theirs(state), path)


def ours(path: Path, state: State) -> None:
    model = small() if "stem.conv2.weight" in state else vanilla()
    model.load_state_dict(state)
    save_checkpoint(model, path)


FORMATS: dict[Callable[[Path, State], None], str] = {
    released: "released",
    released_long_ago: "released",
    released_older_names: "released",
    released_later_shapes: "released",
    bare_released_names: "state_dict",
    bare: "state_dict",
    parallel_and_compiled: "state_dict",
    lightning: "lightning",
    bare_safetensors: "safetensors",
    ours: "vmamba",
}


@pytest.mark.parametrize("name", [name for name in VARIANTS if not VARIANTS[name].release])
@pytest.mark.parametrize("family", ["", "upernet_", "maskrcnn_"])
def test_what_any_variant_of_ours_saves_is_read_back(name: str, family: str, tmp_path: Path) -> None:
    options = {"": {}, "upernet_": {"channels": 8}, "maskrcnn_": {"channels": 8, "hidden": 16}}[family]
    model = create_model(family + name, num_classes=3, **options)
    save_checkpoint(model, path := tmp_path / "model.safetensors", {"model_kwargs": options})
    loaded, _ = load_model(path)
    assert_equal(loaded, model.state_dict())
    torch.save(model.state_dict(), path := tmp_path / "model.pth")
    other = create_model(family + name, num_classes=3, **options)
    load_checkpoint(other, path)
    assert_equal(other, model.state_dict())


@pytest.mark.parametrize("make", [small, vanilla])
@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_every_format_loads_exactly(
    write: Callable[[Path, State], None], make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    state = make().state_dict()
    path = tmp_path / "weights"
    write(path, state)
    model = make()
    info = load_checkpoint(model, path)
    assert_equal(model, state)
    assert info == identify_checkpoint(path)
    assert info.format == FORMATS[write]
    assert info.variant == (SMALL if make is small else None)
    assert (info.num_classes, info.in_chans, info.weights) == (10, 3, ("model",))


def test_numbers_and_config_beside_the_weights_are_told(tmp_path: Path) -> None:
    path = write_released(tmp_path / "released.pth", theirs(small().state_dict()))
    metadata = identify_checkpoint(path).metadata
    assert metadata["epoch"] == 264
    assert metadata["config"]["MODEL"] == {"NAME": "vssm", "DROP_PATH_RATE": 0.2, "DEPTHS": [2, 2, 8, 2]}


@pytest.mark.parametrize("prefixes", [("model.", "model_ema."), ("state_dict.model.", "state_dict.model_ema.module.")])
def test_moving_average_is_loaded_when_asked_for(prefixes: tuple[str, str], tmp_path: Path) -> None:
    plain, average = small().state_dict(), small().state_dict()
    contents: dict[str, State] = {}
    for prefix, state in zip(prefixes, (plain, average), strict=True):
        key, _, inner = prefix.partition(".")
        contents.setdefault(key, {}).update(prefixed(inner, state))
    path = tmp_path / "both.pth"
    torch.save(contents, path)
    model = small()
    assert load_checkpoint(model, path).weights == ("model", "ema")
    assert_equal(model, plain)
    load_checkpoint(model, path, ema=True)
    assert_equal(model, average)


def test_absent_moving_average_is_an_error(tmp_path: Path) -> None:
    bare(path := tmp_path / "weights.pth", small().state_dict())
    assert_refused_unchanged(small(), path, "no ema weights", "ema=False", ema=True)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        ("decode_head.conv_seg.weight", "mmsegmentation"),
        ("roi_head.bbox_head.fc_cls.weight", "mmdetection"),
        ("neck.convs.weight", "openmmlab"),
    ],
)
def test_backbones_of_segmentation_and_detection(head: str, kind: str, tmp_path: Path) -> None:
    state = small().state_dict()
    backbone = {name: tensor for name, tensor in theirs(state).items() if not name.startswith("classifier.")}
    backbone |= {f"outnorm{i}.weight": torch.ones(48) for i in range(3)}
    path = tmp_path / "segmentor.pth"
    torch.save(
        {"meta": {"CLASSES": ("wall",)}, "state_dict": prefixed("backbone.", backbone) | {head: torch.ones(2)}}, path
    )

    info = identify_checkpoint(path)
    assert (info.format, info.variant, info.num_classes, info.backbone_only) == (kind, SMALL, None, True)
    assert_refused_unchanged(small(), path, "backbone without classifier", "reset_head=True", "norm.weight")

    model = small()
    nn.init.constant_(model.norm.weight, 7.0)
    nn.init.constant_(model.head.fc.bias, 7.0)
    load_checkpoint(model, path, reset_head=True)
    expected = state | {"norm.weight": torch.ones(192), "norm.bias": torch.zeros(192), "head.fc.bias": torch.zeros(10)}
    assert_equal(model, expected | {"head.fc.weight": model.head.fc.weight})
    assert 0.015 < model.head.fc.weight.std() < 0.025

    extractor = create_model(SMALL, in_chans=3, features_only=True)
    load_checkpoint(extractor, path)
    assert torch.equal(extractor.state_dict()["model.stem.conv1.weight"], state["stem.conv1.weight"])


@pytest.mark.parametrize("names", [["module"], ["_orig_mod"], ["_orig_mod", "module"], ["model"]], ids=str)
def test_wrapped_models_load_and_save_like_bare_ones(names: list[str], tmp_path: Path) -> None:
    bare(path := tmp_path / "weights.pth", state := small().state_dict())
    wrapped = model = small()
    for name in names:
        wrapped = nn.ModuleDict({name: wrapped})
    load_checkpoint(wrapped, path)
    assert_equal(model, state)
    save_checkpoint(wrapped, path)
    assert safetensors.torch.load_file(path).keys() == state.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_converted_to_the_models_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in small().state_dict().items()}
    bare(path := tmp_path / "weights.pth", state)
    model = small()
    load_checkpoint(model, path)
    assert_equal(model, {name: tensor.float() for name, tensor in state.items()})


def test_weights_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    state = small().state_dict()
    state["stages.1.downsample.norm.bias"][3] = torch.nan
    bare(path := tmp_path / "weights.pth", state)
    with pytest.warns(UserWarning, match=r"NaN or infinity in stages\.1\.downsample\.norm\.bias;"):
        load_checkpoint(small(), path)


# --- Strictness ------------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    state = small().state_dict()
    del state["stages.0.blocks.0.ss2d.A_log"]
    state["stages.9.extra"] = torch.zeros(2, 3)
    state["norm.bias"] = torch.zeros(5)
    bare(path := tmp_path / "weights.pth", state)
    assert_refused_unchanged(
        small(),
        path,
        "1 tensors missing, 1 unexpected, 1 of another shape",
        "missing: stages.0.blocks.0.ss2d.A_log (4, 48, 1)",
        "unexpected: stages.9.extra (2, 3)",
        "norm.bias (5,) torch.float32, expected (192,)",
    )


def test_only_the_first_few_names_are_listed(tmp_path: Path) -> None:
    state = small().state_dict()
    bare(path := tmp_path / "weights.pth", {name: state[name] for name in list(state)[:8]})
    message = assert_refused_unchanged(
        small(), path, f"{len(state) - 8} tensors missing", f"and {len(state) - 13} more"
    )
    assert len(message) < 1000


def test_tensor_of_integers_is_not_a_weight(tmp_path: Path) -> None:
    bare(path := tmp_path / "weights.pth", small().state_dict() | {"norm.bias": torch.zeros(192, dtype=torch.int64)})
    assert_refused_unchanged(small(), path, "norm.bias (192,) torch.int64")


def test_file_of_another_variant_names_it(tmp_path: Path) -> None:
    bare(path := tmp_path / "weights.pth", create_model("vmamba_pico_s2").state_dict())
    message = assert_refused_unchanged(small(), path, "another variant, vmamba_pico_s2")
    call = f"vmamba.create_model('vmamba_pico_s2', checkpoint={str(path)!r}, num_classes=1000)"
    assert call in message
    assert eval(call, {"vmamba": vmamba}).variant == "vmamba_pico_s2"


def test_another_number_of_classes_needs_a_new_head(tmp_path: Path) -> None:
    bare(path := tmp_path / "weights.pth", state := small(num_classes=4).state_dict())
    assert_refused_unchanged(small(), path, "for 4 classes, the model for 10", "num_classes=4", "reset_head=True")
    model = small()
    nn.init.constant_(model.head.fc.bias, 7.0)
    load_checkpoint(model, path, reset_head=True)
    assert_equal(model, state | {"head.fc.weight": model.head.fc.weight, "head.fc.bias": torch.zeros(10)})
    load_checkpoint(headless := small(num_classes=0), path)
    assert torch.equal(headless.norm.weight, state["norm.weight"])


def test_reset_head_draws_a_new_head_of_the_same_size_too(tmp_path: Path) -> None:
    bare(path := tmp_path / "weights.pth", state := small().state_dict())
    load_checkpoint(model := small(), path, reset_head=True)
    assert not torch.equal(model.head.fc.weight, state["head.fc.weight"])
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_another_number_of_channels_needs_adapting(tmp_path: Path) -> None:
    bare(path := tmp_path / "weights.pth", state := small().state_dict())
    assert_refused_unchanged(small(in_chans=1), path, "for images of 3 channels", "in_chans=3", "adapt_input=True")
    assert "for images of" not in assert_refused_unchanged(small(dims=(16, 24, 32)), path, "of another shape")
    load_checkpoint(grey := small(in_chans=1), path, adapt_input=True)
    torch.testing.assert_close(grey.stem.conv1.weight, state["stem.conv1.weight"].sum(dim=1, keepdim=True))
    load_checkpoint(six := small(in_chans=6), path, adapt_input=True)
    torch.testing.assert_close(six.stem.conv1.weight, state["stem.conv1.weight"].repeat(1, 2, 1, 1) / 2)


def _other_activations(model: Any) -> None:
    for block in (block for stage in model.stages for block in stage.blocks):
        block.mlp.act = nn.ReLU()


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "activation": (_other_activations, r"blocks\.0\.mlp\.act is ReLU\(\), built as GELU"),
    "no activation": (lambda model: setattr(model.stages[0].blocks[0].mlp, "act", nn.Identity()), "act is missing"),
    "dilation": (lambda model: vars(model.stages[0].blocks[0].ss2d.conv).update(dilation=(2, 2)), "conv is ConvSiLU"),
    "stride": (lambda model: vars(model.stem.conv1).update(stride=(1, 1)), "stem.conv1 is .*stride=.1, 1.*built as"),
    "eps": (lambda model: vars(model.norm).update(eps=0.1), "norm is LayerNorm.*eps=0.1"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_changes_that_a_file_cannot_hold_are_told(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    model = create_model("vmamba_femto_s2", num_classes=3)
    change(model)
    with pytest.warns(UserWarning, match=f"{words}.*load_checkpoint"):
        save_checkpoint(model, path := tmp_path / "model.safetensors")
    load_checkpoint(model, path)


def _with_another_pattern(model: Any) -> Any:
    model.set_pattern("spiral")
    return model


def _of_torch_s_layers(model: Any) -> Any:
    for layer in model.modules():
        layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else type(layer)
    return model


UNCHANGED: dict[str, Callable[[], nn.Module]] = {
    "arguments": lambda: create_model("vmamba_femto_s2", in_chans=1, drop_path_rate=0.3, output_stride=8),
    "pattern": lambda: _with_another_pattern(create_model("vmamba_femto_s2")),
    "compiled": lambda: torch.compile(create_model("vmamba_femto_s2")),
    "averaged": lambda: ModelEmaV3(create_model("vmamba_femto_s2")),
    "synchronised": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(create_model("vmamba_femto_local")),
    "torch's layers": lambda: _of_torch_s_layers(create_model("vmamba_femto_s2")),
    "features": lambda: create_model("vmamba_femto_s2", features_only=True),
    "no name": lambda: vmamba.VMamba(depths=(1,), dims=(8,)),
    "timm's": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.1, num_classes=2),
    "timm's with batch norm": lambda: timm.create_model("resnet18", num_classes=2),
}


@pytest.mark.parametrize("make", UNCHANGED.values(), ids=UNCHANGED)
@pytest.mark.filterwarnings("error:.*load_model")
def test_nothing_is_told_where_nothing_was_changed(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, before = make(), torch.get_rng_state()
    save_checkpoint(model, tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dims": (16, 32)}, r"dims=\(8, 12\), not \(16, 32\)"),
        ({"depths": (1, 2)}, r"depths=\(1, 1\), not \(1, 2\)"),
        ({"d_state": 3}, "d_state=1, not 3"),
        ({"ssm_ratio": 2.0}, "ssm_ratio=1.0, not 2.0"),
        ({"stem": "patch"}, "stem='conv', not 'patch'"),
        ({"mlp_ratio": 2.0, "gated": True}, "gated=False, not True; mlp_ratio=4.0, not 2.0"),
        ({"mlp": "local"}, "mlp='pixel', not 'local'"),
    ],
)
def test_options_that_keep_a_file_out_are_named(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"depths": (1, 1), "dims": (8, 12), "in_chans": 5, "num_classes": 2}
    bare(path := tmp_path / "weights.pth", vmamba.VMamba(**arguments).state_dict())
    with pytest.raises(CheckpointError, match=f"a network with .*{words}") as caught:
        load_checkpoint(vmamba.VMamba(**arguments | options), path)
    assert "for images of" not in str(caught.value)


def test_model_without_memory_is_refused(tmp_path: Path) -> None:
    bare(path := tmp_path / "weights.pth", small().state_dict())
    with pytest.raises(CheckpointError, match="meta device"):
        load_checkpoint(small(device="meta"), path)


def test_several_networks_in_one_file_are_not_guessed_at(tmp_path: Path) -> None:
    state = small().state_dict()
    torch.save({"student": state, "teacher": state}, path := tmp_path / "weights.pth")
    assert_refused_unchanged(small(), path, "'student.' and 'teacher.'")


def test_a_parameter_under_two_names_is_refused(tmp_path: Path) -> None:
    state = small().state_dict()
    bare(path := tmp_path / "weights.pth", state | {"patch_embed.0.weight": state["stem.conv1.weight"]})
    assert_refused_unchanged(small(), path, "patch_embed.0.weight is there twice")


def test_weights_of_another_network(tmp_path: Path) -> None:
    bare(path := tmp_path / "resnet.pth", {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    assert_refused_unchanged(small(), path, "holds no VMamba", "conv1.weight (64, 3, 7, 7)")
    bare(path, {"layers.0.norm.weight": torch.zeros(96), "patch_embed.proj.weight": torch.zeros(96, 3, 4, 4)})
    assert identify_checkpoint(path).variant is None


# --- Our own files ---------------------------------------------------------------------------------------------------


def test_a_saved_model_is_rebuilt_from_its_file_alone(tmp_path: Path) -> None:
    model = create_model("vmamba_pico_s2", num_classes=3, in_chans=4, dims=(32, 48, 64, 80), img_size=(48, 64))
    path = tmp_path / "new" / "model.safetensors"
    kwargs = {"dims": [32, 48, 64, 80]}
    save_checkpoint(
        model, path, {"class_names": ["ant", "bee", "猫"], "model_kwargs": kwargs, "mean": [0.1] * 4, "top1": 9.5}
    )
    again, metadata = load_model(path)
    assert_equal(again, model.state_dict())
    assert not again.training
    assert metadata == read_metadata(path)
    assert metadata == {
        "format": 1, "variant": "vmamba_pico_s2", "num_classes": 3, "in_chans": 4, "img_size": [48, 64],
        "class_names": ["ant", "bee", "猫"], "mean": [0.1] * 4, "std": list(model.pretrained_cfg["std"]),
        "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center", "model_kwargs": kwargs, "top1": 9.5,
    }  # fmt: skip
    assert (again.variant, again.img_size, again.pretrained_cfg["mean"]) == ("vmamba_pico_s2", (48, 64), [0.1] * 4)
    images = torch.randn(1, 4, 48, 64)
    assert torch.equal(again(images), model.eval()(images))
    assert identify_checkpoint(path).format == "vmamba"


def test_a_model_is_rebuilt_from_a_released_file(tmp_path: Path) -> None:
    model = small(num_classes=7)
    path = write_released(tmp_path / "released.pth", theirs(model.state_dict()))
    again, metadata = load_model(path)
    assert_equal(again, model.state_dict())
    assert (metadata["variant"], metadata["num_classes"], metadata["in_chans"]) == (SMALL, 7, 3)
    assert "class_names" not in metadata
    with pytest.raises(CheckpointError, match="not written by this package"):
        read_metadata(path)


def test_a_file_of_no_known_variant_cannot_be_rebuilt(tmp_path: Path) -> None:
    save_checkpoint(model := vanilla(), path := tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no variant known here"):
        load_model(path)
    load_checkpoint(again := vanilla(), path)
    assert_equal(again, model.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_kwargs": {"pretrained": True}}, "model_kwargs has pretrained"),
        ({"model_kwargs": {"pretrained_cfg": {"file": "/etc/passwd"}}}, "model_kwargs has pretrained_cfg"),
        ({"model_kwargs": {"device": "cuda"}}, "model_kwargs has device"),
        ({"model_kwargs": {"stem": "soup"}}, "stem is 'soup'"),
        ({"model_kwargs": {"d_state": 3}}, "of another shape"),
        ({"model_kwargs": {"dims": [1 << 20] * 3}}, "of another shape"),
        ({"model_kwargs": "wide"}, "cannot be built"),
        ({"img_size": "large"}, "cannot be built"),
        ({"variant": "vmamba_nano", "img_size": [32, 32]}, f"another variant, {SMALL}"),
        ({"variant": ["x"]}, "no variant known here"),
        ({"format": 2}, "upgrade vmamba"),
    ],
)
def test_metadata_is_not_trusted(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_checkpoint(small(), path := tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=words):
        load_model(path)


def test_one_name_is_no_list_of_classes(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="class_names is 'cat'; expected a list of names"):
        save_checkpoint(small(), tmp_path / "model.safetensors", {"class_names": "cat"})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"variant": "x"}', "[" * 100_000])
def test_damaged_metadata(text: str, tmp_path: Path) -> None:
    safetensors.torch.save_file(small().state_dict(), path := tmp_path / "model.safetensors", {"vmamba": text})
    with pytest.raises(CheckpointError, match="metadata is damaged"):
        read_metadata(path)


def test_saving_replaces_a_file_only_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(model := small(), path := tmp_path / "model.safetensors")
    before = path.read_bytes()

    def interrupted(partial: Path, data: bytes) -> None:
        with partial.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(model, path)
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(model, path, {"class_names": {1, 2}})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    save_checkpoint(other := small(), path)
    assert_equal(load_model(path)[0], other.state_dict())


def test_metadata_can_be_read_without_this_package(tmp_path: Path) -> None:
    save_checkpoint(small(), path := tmp_path / "model.safetensors", {"class_names": ["a", "b"]})
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["vmamba"])["class_names"] == ["a", "b"]
