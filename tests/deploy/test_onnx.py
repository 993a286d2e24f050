"""ONNX files against the models they were made from, in ONNX Runtime and OpenVINO."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune, weight_norm

import vmamba
from vmamba.cli import main
from vmamba.deploy import export_onnx
from vmamba.deploy.export import metadata_of
from vmamba.errors import ExportError
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.vmamba import VMamba
from vmamba.nn import SS2D
from vmamba.ops import selective_scan

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def _small(**options):
    torch.manual_seed(0)
    options = {"depths": (1, 1), "dims": (16, 24), "num_classes": 5, "img_size": 24, "stem_stride": 2} | options
    model = VMamba(**options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if trained: some begin as zero, which leaves nothing of a branch
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            for values in (module.weight, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    return model


def _segmenter(backbone, **options):
    torch.manual_seed(0)
    options = {"num_classes": 3, "channels": 8, "auxiliary_channels": 0, "img_size": 48} | options
    return vmamba.create_model("upernet", backbone=backbone, **options).eval()


def _run(path, images, **options):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"], **options)
    return session.run(None, {"images": images.numpy()})


def _assert_as(model, path, *shapes):
    for shape in shapes:
        images = torch.randn(shape)
        with torch.no_grad():
            expected = model(images)
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        for found, wanted in zip(_run(path, images), expected, strict=True):
            assert np.abs(found - wanted.numpy()).max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"d_state": 3, "gated": True, "mlp_ratio": 0.0, "stem": "patch", "downsample": "merge", "in_chans": 1},
        {"pattern": "bidirectional", "in_chans": 5},
        {"pattern": "spiral"},
        {
            "mlp": "local", "mlp_ratio": 1.0, "norm": "batch", "stem": "small", "downsample": "residual",
            "local_stages": 1,
        },
    ],
    ids=["vanilla", "bidirectional", "function", "local"],
)  # fmt: skip
def test_files_compute_what_the_model_does(options, tmp_path):
    """At batches, heights and widths that the graph was not traced with; of standard operators alone."""
    model, path = _small(**options), tmp_path / "model.onnx"
    sizes = "batch" if options.get("pattern") == "spiral" else "open"  # a function of Python numbers
    written = export_onnx(model, path, sizes=sizes)
    assert written.path == path
    assert len(written.differences) == 3
    assert max(written.differences.values()) < 1e-5
    chans = options.get("in_chans", 3)
    shapes = [(1, chans, 24, 24), (4, chans, 24, 24)]
    _assert_as(model, path, *shapes, *([(2, chans, 9, 35), (1, chans, 40, 7)] if sizes == "open" else []))
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 20)]
    assert not proto.functions
    assert b".py" not in path.read_bytes()  # no names of this machine's files
    assert list(tmp_path.iterdir()) == [path]


def test_changed_models(tmp_path):
    """A swapped layer, another head and a hook: what is traced is what the user made."""
    model = _small()
    model.stages[0].blocks[0].ss2d.conv = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    model.head.fc = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 2))
    model.stages[1].register_forward_hook(lambda module, args, y: 2 * y)
    export_onnx(model, tmp_path / "model.onnx")
    _assert_as(model, tmp_path / "model.onnx", (2, 3, 20, 28))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_pruned_models(tmp_path):
    """Whose weights each pass computes, and who cannot be copied as they are."""
    model = _small()
    prune.l1_unstructured(model.head.fc, "weight", 0.5)
    weight_norm(model.stages[0].blocks[0].mlp.fc1)
    pruned = model.head.fc.weight
    export_onnx(model, tmp_path / "model.onnx")
    assert model.head.fc.weight is pruned
    _assert_as(model, tmp_path / "model.onnx", (2, 3, 20, 28))


def test_dense_models_and_features(tmp_path):
    model = _segmenter("vmamba_femto_s2")
    export_onnx(model, tmp_path / "dense.onnx", class_names=["sky", "树", "road"])
    _assert_as(model, tmp_path / "dense.onnx", (1, 3, 41, 64), (2, 3, 32, 32))
    metadata = {prop.key: prop.value for prop in onnx.load(tmp_path / "dense.onnx").metadata_props}
    assert metadata["task"] == "segmentation"
    assert json.loads(metadata["class_names"]) == ["sky", "树", "road"]
    assert json.loads(metadata["preprocessing"])["mean"] == pytest.approx([0.485, 0.456, 0.406])
    extractor = vmamba.create_model("vmamba_femto_s2", features_only=True).eval()
    export_onnx(extractor, tmp_path / "features.onnx")
    _assert_as(extractor, tmp_path / "features.onnx", (1, 3, 16, 40))


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_the_size_that_another_of_timms_classifiers_was_trained_at(format, tmp_path):
    model = timm.create_model("test_resnet", num_classes=2, in_chans=1)
    save_checkpoint(model, tmp_path / "model.safetensors", {"img_size": [48, 64], "mean": [0.3], "std": [0.4]})
    command = ["export", str(tmp_path / "model.safetensors"), "--format", format]
    assert main([*command, "--output", str(tmp_path / "exported")]) == 0
    if format == "onnx":
        metadata = {prop.key: prop.value for prop in onnx.load(tmp_path / "exported").metadata_props}
    else:
        torch.export.load(tmp_path / "exported", extra_files=(metadata := {"metadata.json": ""}))
        metadata = json.loads(metadata["metadata.json"])
    told = json.loads(metadata["preprocessing"])
    assert (told["img_size"], told["in_chans"], told["mean"], told["std"]) == ([48, 64], 1, [0.3], [0.4])


def test_segmentation_on_a_backbone_of_timms(tmp_path):
    model = _segmenter("test_resnet", out_norm=False, out_indices=(2, 3))
    export_onnx(model, tmp_path / "model.onnx")
    _assert_as(model, tmp_path / "model.onnx", (1, 3, 41, 64), (2, 3, 32, 32))


def _probabilities(model, pictures):
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        return model((pictures / 255 - mean) / std).softmax(1).numpy()


def test_pictures_in_labels_out(tmp_path):
    model, path = _small(), tmp_path / "model.onnx"
    export_onnx(model, path, embed=True, class_names=list("abcde"))
    pictures = torch.randint(0, 256, (3, 3, 30, 26), dtype=torch.uint8)
    labels, probabilities = _run(path, pictures)
    expected = _probabilities(model, pictures)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert labels.tolist() == expected.argmax(1).tolist()


def test_half_precision(tmp_path):
    model, path = _small(), tmp_path / "half.onnx"
    export_onnx(model, path, half=True)
    images = torch.randn(2, 3, 24, 32)
    (half,) = _run(path, images)
    with torch.no_grad():
        whole = model(images).numpy()
    assert half.dtype == np.float32
    assert 1e-6 < np.abs(whole - half).max() / np.abs(whole).max() < 2e-2
    weights = {tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4}
    assert onnx.TensorProto.FLOAT16 in weights


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_half_precision_from_pictures(task, tmp_path):
    """Normalisation and decision stay in float32, and the scans' sums, which here are beyond what float16 can say."""
    layers = {"depths": (1, 1), "dims": (16, 24)}
    model = _small() if task == "classification" else _segmenter("vmamba_femto", **layers)
    for module in model.modules():
        if isinstance(module, SS2D):
            module.conv.weight.data.mul_(100)
            module.D.data.fill_(6e4)
    path = tmp_path / "half.onnx"
    export_onnx(model, path, half=True, embed=True)
    pictures = torch.randint(0, 256, (2, 3, 40, 33), dtype=torch.uint8)
    labels, probabilities = _run(path, pictures)
    expected = _probabilities(model, pictures)
    assert (labels.dtype, probabilities.dtype) == (np.int64, np.float32)
    assert (labels == probabilities.argmax(1)).all()
    assert 1e-6 < np.abs(probabilities - expected).max() < 2e-2
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)  # as those of a softmax in float16 would not
    weights = {tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4}
    assert onnx.TensorProto.FLOAT16 in weights


class _Sequence(nn.Module):
    num_classes = 4

    def forward(self, x):
        u = x.flatten(1, 2)[:, :4]
        B, C = u[:, :2], u[:, 2:4]
        y, last = selective_scan(u, u - 1, -torch.ones(4, 2), B, C, delta_softplus=True, return_last_state=True)
        return y.mean(2) + last.sum(2)


def test_selective_scan_has_its_loop(tmp_path):
    model = _Sequence()
    written = export_onnx(model, tmp_path / "model.onnx")
    assert written.nodes < 150
    _assert_as(model, tmp_path / "model.onnx", (2, 3, 5, 7), (1, 3, 4, 100))


def test_steep_steps_stay_finite(tmp_path):
    """Δ beyond where exp overflows, and decays that reach 0."""
    torch.manual_seed(0)
    layer = SS2D(16, d_state=1).eval()
    with torch.no_grad():
        layer.dt_proj_bias.copy_(torch.linspace(-100, 200, 64).view(4, 16))

    class Grid(nn.Module):
        def forward(self, x):
            return layer(x.permute(0, 2, 3, 1))

    Grid.in_chans = 16
    written = export_onnx(Grid(), tmp_path / "model.onnx")
    assert max(written.differences.values()) < 1e-5


# In a process of its own: while it has a Core, OpenVINO (2026.4) gives the thread another stack for signals. Where
# the lives of two overlap, the freed stack of one stays behind, and the next signal, say of a child's end, ends the
# process.
OPENVINO = """
import sys, numpy, openvino
core = openvino.Core()
for path in sys.argv[2:]:
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    numpy.save(path + ".npy", compiled([numpy.load(sys.argv[1])])[0])
"""


def test_openvino_runs_the_file(tmp_path):
    pytest.importorskip("openvino")
    images, models = torch.randn(2, 3, 20, 28), {str(tmp_path / f"{n}.onnx"): _small(d_state=n) for n in (1, 2)}
    for path, model in models.items():
        export_onnx(model, path)
    np.save(tmp_path / "images.npy", images.numpy())
    command = [sys.executable, "-c", OPENVINO, str(tmp_path / "images.npy"), *models]
    subprocess.run(command, check=True, timeout=120)
    for path, model in models.items():
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(np.load(f"{path}.npy"), expected, atol=1e-5 * np.abs(expected).max())


def test_refusals(tmp_path):
    model, path = _small(), tmp_path / "model.onnx"
    path.write_bytes(b"before")
    with pytest.raises(ExportError, match=r"differs from the model by .* and 0.0e\+00 is accepted"):
        export_onnx(model, path, tolerance=0.0)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ExportError, match="is a folder"):
        export_onnx(model, tmp_path)
    with pytest.raises(ExportError, match="is no folder"):
        export_onnx(model, tmp_path / "none" / "model.onnx")
    with pytest.raises(ExportError, match="takes no pictures"):
        export_onnx(_small(in_chans=5), path, embed=True)
    with pytest.raises(ExportError, match="one output, among which there is nothing to decide"):
        export_onnx(_small(num_classes=1), path, embed=True)
    with pytest.raises(ExportError, match="2 names of classes were given; the model has 5 classes"):
        export_onnx(model, path, class_names=["a", "b"])
    for name in ("model.pt2", "model.safetensors", "model.PTH"):
        with pytest.raises(ExportError, match=rf"{name} would be taken for another kind of file; name it \*\.onnx"):
            export_onnx(model, tmp_path / name)
    model.register_forward_hook(lambda module, given, y: {"logits": y})
    with pytest.raises(ExportError, match=r"VMamba gives a dict; expected a tensor, or a list or tuple of tensors$"):
        export_onnx(model, path)
    assert list(tmp_path.iterdir()) == [path]


def test_classes_without_names_have_imagenets_or_numbers(tmp_path):
    names = metadata_of(_small(num_classes=1000), None, None)["class_names"]
    assert json.loads(names)[1].startswith("goldfish")
    assert json.loads(metadata_of(_small(), None, None)["class_names"]) == [f"class {i}" for i in range(5)]
