"""Models whose scans follow other routes: made, changed, copied, saved, loaded, compiled and exported."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

import vmamba
from vmamba.errors import CheckpointError
from vmamba.models.checkpoints import read_metadata, save_checkpoint
from vmamba.models.registry import load_model
from vmamba.nn import SS2D
from vmamba.ops import PATTERNS

SMALL = {"depths": (1, 1, 1), "dims": (8, 8, 8), "in_chans": 1, "num_classes": 3}


def snake(height: int, width: int) -> np.ndarray:
    """Rows, every other one backwards, without torch."""
    rows = np.arange(height * width).reshape(height, width)
    rows[1::2] = rows[1::2, ::-1]
    columns = np.arange(height * width).reshape(height, width).T.copy()
    columns[1::2] = columns[1::2, ::-1]
    return np.stack([rows.ravel(), columns.ravel(), rows.ravel()[::-1], columns.ravel()[::-1]])


@pytest.fixture
def registered(monkeypatch):
    """A name for `snake`, in this test only."""
    monkeypatch.setitem(PATTERNS, "cross", PATTERNS["cross"])  # puts back what was there
    vmamba.register_pattern("snake", snake)
    yield "snake"
    PATTERNS.pop("snake", None)


def small(pattern="cross", **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    model = vmamba.create_model("vmamba_nano", pattern=pattern, drop_path_rate=0.0, **SMALL, **kwargs).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # a new model's scans add little to its result
            weight.mul_(8 if name.endswith(("proj.weight", "conv.weight")) else 1)
    return model


def _layers(*patterns):
    torch.manual_seed(0)
    return (
        torch.nn.Sequential(*(SS2D(8, d_state=2, pattern=pattern) for pattern in patterns)).eval().requires_grad_(False)
    )


@pytest.fixture
def images():
    return torch.randn(2, 1, 37, 26)


def test_a_pattern_changes_what_a_model_computes_and_nothing_else(images):
    plain, diagonal = small(), small("diagonal")
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, diagonal.state_dict()[name])
    expected = diagonal(images)
    assert (expected - plain(images)).abs().max() > 1e-4
    plain.set_pattern("diagonal")
    assert torch.equal(plain(images), expected)
    assert plain.pattern == "diagonal"
    assert "pattern='diagonal'" in repr(plain)
    plain.set_pattern(PATTERNS["diagonal"])
    assert torch.equal(plain(images), expected)


def test_one_pattern_for_each_block(images):
    mixed = small(["cross", "spiral", "diagonal"])
    assert [m.pattern for m in mixed.modules() if isinstance(m, SS2D)] == ["cross", "spiral", "diagonal"]
    assert mixed.pattern == ["cross", "spiral", "diagonal"]
    other = small()
    other.set_pattern(mixed.pattern)
    assert torch.equal(other(images), mixed(images))
    with pytest.raises(ValueError, match="2 patterns; expected one, or 3, one a block"):
        small(["cross", "spiral"])
    with pytest.raises(ValueError, match="pattern is 'zigzag'"):
        other.set_pattern(["cross", "cross", "zigzag"])
    assert other.pattern == mixed.pattern


@pytest.mark.parametrize("pattern", ["hilbert", snake, ["cross", "spiral", "diagonal"]])
def test_copies_follow_the_pattern(pattern, images):
    model = small(pattern)
    expected = model(images)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)


def test_a_compiled_layer_follows_the_pattern():
    torch.compiler.reset()
    for pattern in ("diagonal", snake):  # by name, and by a function without torch
        model = _layers(pattern).requires_grad_()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for size in ((5, 4), (3, 9)):
            x = torch.randn(2, *size, 8)
            results = []
            for network in (model, compiled):
                model.zero_grad()
                y = network(x)
                y.square().sum().backward()
                results.append([y, *(p.grad.clone() for p in model.parameters())])
            torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    layers, grid = _layers("hilbert", snake, "diagonal"), torch.randn(1, 5, 4, 8)
    program = torch.export.export(layers, (grid,), strict=strict)
    assert not [node for node in program.graph.nodes if "vmamba" in str(node.target)]
    torch.testing.assert_close(program.module()(grid), layers(grid), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
def test_export_for_open_sizes(strict):
    """A pattern made by torch's functions stays open; another says that it cannot."""
    sizes = {axis: torch.export.Dim(name, min=2, max=64) for axis, name in ((1, "height"), (2, "width"))}
    layers, grid = _layers("spiral", "diagonal"), torch.randn(2, 5, 4, 8)
    program = torch.export.export(layers, (grid,), dynamic_shapes={"input": sizes}, strict=strict)
    for x in (grid, torch.randn(2, 3, 9, 8)):
        torch.testing.assert_close(program.module()(x), layers(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match=r"snake cannot be traced for open sizes.*export for a fixed size") as caught:
        torch.export.export(_layers(snake), (grid,), dynamic_shapes={"input": sizes}, strict=strict)
    assert strict or caught.type is ValueError


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning")
def test_a_trace_takes_other_sizes_where_the_pattern_does():
    layers = _layers("spiral", "diagonal")
    trace = torch.jit.trace(layers, torch.randn(1, 5, 4, 8))
    for x in (torch.randn(1, 5, 4, 8), torch.randn(2, 3, 9, 8)):
        torch.testing.assert_close(trace(x), layers(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["hilbert", snake, PATTERNS["diagonal"]])
def test_a_feature_extractor_follows_the_pattern(pattern):
    """torch.fx, whose graphs hold no functions."""
    layer, grid = _layers(pattern)[0], torch.randn(1, 5, 4, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(grid), layer(grid))


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_hold_names(registered, images, tmp_path: Path):
    for pattern, stored in (("diagonal", "diagonal"), (snake, "snake"), (["cross", snake, "spiral"], None)):
        model = small(pattern)
        save_checkpoint(model, path := tmp_path / "model.safetensors")
        assert read_metadata(path)["model_kwargs"]["pattern"] == (stored or ["cross", "snake", "spiral"])
        assert torch.equal(load_model(path)[0](images), model(images))


def test_a_pattern_set_later_is_saved(images, tmp_path: Path):
    model = small()
    model.set_pattern("spiral")
    save_checkpoint(model, path := tmp_path / "model.safetensors")
    assert torch.equal(load_model(path)[0](images), model(images))
    model.set_pattern("cross")
    save_checkpoint(model, path)
    assert "pattern" in read_metadata(path)["model_kwargs"]  # it was given when the model was made
    assert load_model(path)[0].pattern == "cross"


def test_timm_saves_the_pattern_that_a_model_has_now(images, tmp_path: Path):
    model = timm.create_model("vmamba_femto", **SMALL, pattern="diagonal").eval()
    for i, pattern in enumerate(("spiral", "cross", ["cross", "spiral", "diagonal"])):
        model.set_pattern(pattern)
        save_for_hf(model, folder := tmp_path / str(i))
        other = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert other.pattern == pattern
        assert torch.equal(other(images), model(images))


def test_weights_that_learned_with_another_pattern_are_loaded_with_a_warning(registered, tmp_path: Path):
    save_checkpoint(small(snake), path := tmp_path / "model.safetensors")
    for pattern in ("snake", snake):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vmamba.load_checkpoint(small(pattern), path)
    with pytest.warns(UserWarning, match=r"with the scan pattern 'snake', but the model has 'cross'.*pattern='snake'"):
        vmamba.load_checkpoint(small(), path)


def test_a_backbone_of_a_dense_model_keeps_its_pattern(tmp_path: Path):
    model = vmamba.create_model("upernet_vmamba_nano", num_classes=2, pattern="diagonal", channels=8).eval()
    save_checkpoint(model, path := tmp_path / "model.safetensors")
    loaded, _ = load_model(path)
    assert {m.pattern for m in loaded.modules() if isinstance(m, SS2D)} == {"diagonal"}


def test_what_a_file_cannot_hold_or_nobody_knows(registered, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(
        TypeError, match=r"JSON, which cannot hold <function .*register it by a name, vmamba.register_pattern"
    ):
        save_checkpoint(small(lambda height, width: snake(height, width)), path)
    assert not list(tmp_path.iterdir())
    save_checkpoint(small("snake"), path)
    PATTERNS.pop("snake")
    with pytest.raises(CheckpointError, match=r"pattern is 'snake'.*vmamba.register_pattern\(name, function\)"):
        load_model(path)
