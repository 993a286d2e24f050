"""Files in int8 against the float32 models that they were made from."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vmamba
from vmamba.cli import main
from vmamba.data.transforms import Preprocessing
from vmamba.deploy import export_onnx, int8_onnx, load_quantized, quantize
from vmamba.deploy.calibration import gather, open_pictures
from vmamba.deploy.int8 import computes_in_int8, is_excluded
from vmamba.deploy.quantize import _damage, _overflows
from vmamba.errors import CheckpointError, DataError, ExportError
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.vmamba import VMamba

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

NAMES = ["sea", "树", "road", "sky", "field"]
PRODUCTS = 2 * 4 + 3  # of two blocks, the stem, the downsampling and the head


def _small(**options):
    torch.manual_seed(0)
    options = {"depths": (1, 1), "dims": (16, 24), "num_classes": 5, "img_size": 24, "stem_stride": 2} | options
    return VMamba(**options).eval()


def _pictures(count=24, seed=0):
    """Coloured gradients with noise, uint8 (32, 28, 3)."""
    draw = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, 32)[:, None, None] * draw.uniform(0, 200, (count, 1, 1, 3))
    return list((ramp + draw.uniform(0, 55, (count, 32, 28, 3))).astype(np.uint8))


def _run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})


def _metadata(proto):
    return {prop.key: prop.value for prop in proto.metadata_props}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A float32 ONNX file."""
    path = tmp_path_factory.mktemp("whole") / "whole.onnx"
    export_onnx(_small(), path, class_names=NAMES)
    return path


@pytest.fixture(scope="module")
def eighth(whole):
    """The same in int8, and what was said of it."""
    written = quantize(whole, whole.parent / "int8.onnx", _pictures(), reduce_range=False)
    return onnx.load(written.path), written


def _scan_bodies(graph):
    for node in graph.node:
        if node.op_type == "Scan":
            (body,) = (attribute.g for attribute in node.attribute if attribute.name == "body")
            yield [(inner.op_type, list(inner.input), list(inner.output)) for inner in body.node]


def test_products_are_int8_and_the_rest_is_as_before(whole, eighth):
    proto, written = eighth
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 20)]
    before = onnx.load(whole)
    assert list(_scan_bodies(proto.graph)) == list(_scan_bodies(before.graph))
    assert len(list(_scan_bodies(proto.graph))) > 1
    makers = {output: node for node in proto.graph.node for output in node.output}
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    int8, depthwise, projections = [], 0, 0
    for node in proto.graph.node:
        from_int8 = [name for name in node.input if name in makers and makers[name].op_type == "DequantizeLinear"]
        if node.op_type in ("MatMul", "Gemm", "Conv") and len(from_int8) >= 2:
            weight, scale = (weights[name] for name in makers[node.input[1]].input[:2])
            assert weight.data_type == onnx.TensorProto.INT8
            outputs = weight.dims[1 if node.op_type == "MatMul" else 0]
            assert list(scale.dims) == [outputs]  # one for each output
            int8.append(node.op_type)
        elif node.op_type == "Conv":
            depthwise += weights[node.input[1]].dims[1] < 8
        elif node.op_type == "MatMul":
            projections += 1  # to Δ's low rank, B and C; from there to Δ
        elif node.op_type in ("LayerNormalization", "Gelu", "Sigmoid", "Add", "Mul", "Exp"):
            assert all(makers[name].op_type != "DequantizeLinear" or "Conv" in _behind(makers, name)
                       for name in from_int8)  # fmt: skip
    assert len(int8) == written.layers == PRODUCTS
    assert depthwise == 3  # and the one that reads the picture
    assert projections == 4
    assert not any(node.metadata_props for node in proto.graph.node)  # which name files of this machine
    assert [path.name for path in whole.parent.iterdir() if path.name.startswith(".")] == []


def _behind(makers, name):
    """The operators in front of a value that was quantised: what int8 convolutions give is int8."""
    return [makers[source].op_type for source in makers[makers[name].input[0]].input if source in makers]


def test_metadata_stays(whole, eighth):
    proto, _ = eighth
    after = _metadata(proto)
    note = json.loads(after.pop("quantization"))
    assert after == _metadata(onnx.load(whole))
    assert json.loads(after["class_names"]) == NAMES
    assert note == {"weights": "int8", "activations": "uint8", "reduced_range": False, "calibrated_on": 18}


def test_metadata_that_is_given_is_written(whole):
    pre, names = Preprocessing((20, 20), mean=(0, 0, 0), std=(1, 1, 1)), list("vwxyz")
    path = whole.parent / "told.onnx"
    quantize(whole, path, _pictures(), preprocessing=pre, class_names=names, reduce_range=False, tolerance=1.0)
    told = _metadata(onnx.load(path))
    assert Preprocessing.from_dict(json.loads(told["preprocessing"])) == pre
    assert json.loads(told["class_names"]) == names
    assert told["model"] == _metadata(onnx.load(whole))["model"]


def test_differences_are_those_of_the_pictures_held_back(whole, eighth):
    _, written = eighth
    pre = Preprocessing.from_dict(json.loads(_metadata(onnx.load(whole))["preprocessing"]))
    calibration = gather(_pictures(), 3, pre, 128, 128)
    assert (written.calibrated, written.checked) == (len(calibration.seen), len(calibration.held_back)) == (18, 6)
    images = pre.normalise(calibration.held_back).numpy()
    (one,), (other,) = _run(written.path, images), _run(whole, images)
    assert written.mean == pytest.approx(np.sqrt(np.square(one - other).mean() / np.square(other).mean()), rel=1e-3)
    assert written.largest == pytest.approx(np.abs(one - other).max() / np.abs(other).max(), rel=1e-3)
    assert written.agreement == (one.argmax(1) == other.argmax(1)).mean()
    assert 1e-4 < written.mean < 0.05
    images = np.random.default_rng(1).standard_normal((3, 3, 41, 30), np.float32)
    (one,), (other,) = _run(written.path, images), _run(whole, images)  # a size that it was not calibrated at
    assert np.abs(one - other).max() < 0.2 * np.abs(other).max()


def test_changed_models_and_excluded_layers(tmp_path):
    """A swapped layer, another head and a hook, with uint8 pictures in and labels out; 7 bits."""
    model = _small()
    model.stages[0].blocks[0].ss2d.out_proj = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16))
    model.head.fc = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))
    model.num_classes = 3
    model.stages[1].register_forward_hook(lambda module, args, y: 2 * y)
    path, pictures = tmp_path / "int8.onnx", [Image.fromarray(picture) for picture in _pictures()]
    written = quantize(model, path, pictures, embed=True, exclude=["head*", "*.mlp.fc2"], reduce_range=True)
    assert written.layers == PRODUCTS + 1 - 1 - 2
    raw = np.stack([np.asarray(picture)[:24, :24].transpose(2, 0, 1) for picture in pictures])
    labels, probabilities = _run(path, raw)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        expected = model((torch.tensor(raw) / 255 - mean) / std).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, expected, atol=0.05)
    assert labels.tolist() == probabilities.argmax(1).tolist()
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    weights = [tensor for tensor in weights if tensor.dtype == np.int8 and tensor.ndim >= 2]
    assert len(weights) == written.layers
    assert 32 < max(np.abs(tensor.astype(int)).max() for tensor in weights) <= 64


def test_detection(tmp_path):
    """All of a detector but what gives its scores and boxes, from its weights and from its float32 file."""
    torch.manual_seed(0)
    model = vmamba.create_model(
        "maskrcnn", backbone="vmamba_femto", num_classes=3, channels=8, hidden=16, img_size=(48, 64), score_thr=0.3
    ).eval()
    for layer in (model.rpn_head.rpn_cls, model.rpn_head.rpn_reg, model.roi_head.bbox_head.fc_cls):
        nn.init.normal_(layer.weight, std=0.5)
    nn.init.constant_(model.roi_head.mask_head.conv_logits.bias, 1.0)  # most of each box
    path = tmp_path / "whole.onnx"
    export_onnx(model, path, class_names=NAMES[:3])
    written = quantize(path, tmp_path / "int8.onnx", _pictures(), tolerance=0.3)
    assert 0.01 < written.mean < 0.2
    assert 0.8 < written.agreement < 1
    assert written.unit == "of the detections, by score"
    proto = onnx.load(written.path)
    onnx.checker.check_model(proto, full_check=True)
    assert _metadata(proto).items() >= _metadata(onnx.load(path)).items()
    kinds = [node.op_type for node in proto.graph.node]
    assert {"NonMaxSuppression", "RoiAlign", "QuantizeLinear"} <= {*kinds}
    whole = onnx.load(path)
    makers = {output: node for node in proto.graph.node for output in node.output}
    int8 = [node for node in proto.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")
            and makers.get(node.input[1], node).op_type == "DequantizeLinear"]  # fmt: skip
    assert len(int8) == written.layers
    layers = {int8_onnx._layer(node)[0] for node in whole.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")}
    kept = {"rpn_head.rpn_cls", "rpn_head.rpn_reg", "roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg"}
    assert kept < layers
    chosen = {layer for _, layer in int8_onnx._products(whole.graph)}
    assert {"rpn_head.rpn_conv", "neck.fpn_convs.0.conv", "roi_head.mask_head.conv_logits"} <= chosen <= layers - kept
    images = np.random.default_rng(1).standard_normal((2, 3, 70, 50), np.float32)
    boxes, scores, _, picture, masks = _run(written.path, images)
    assert len(boxes) == len(scores) == len(picture) > 0
    assert masks.shape[1:] == (70, 50)
    calibration = gather(_pictures(), 3, Preprocessing((48, 64)), 128, 128)
    nothing = [np.zeros((0, 4)), *np.zeros((3, 0)), np.zeros((0, 48, 64), bool)]
    with pytest.raises(DataError, match=r"in 6 pictures held back the float32 model finds nothing"):
        _damage(lambda batch: _run(written.path, batch.numpy()), lambda batch: nothing, calibration, "detection")


def test_pictures_of_dense_models_keep_their_ratio():
    pictures = [np.full((40, 90, 3), 200, np.uint8), np.full((90, 40, 3), 200, np.uint8), *_pictures(8)]
    pre = Preprocessing((32, 128), crop_pct=0.5)
    found = gather(pictures, 3, pre, 10, 2, fitted=True)
    assert found.seen.shape[1:] == found.held_back.shape[1:] == (3, 37, 32)  # of that which is drawn first
    assert gather(pictures, 3, pre, 10, 2).seen.shape[1:] == (3, 32, 128)
    landscape = gather(pictures[:1] * 8, 3, pre, 6, 2, fitted=True)
    assert landscape.seen.shape[1:] == (3, 32, 72)
    assert (landscape.seen == 200).all()  # nothing is filled up


def test_graphs_of_one_size(tmp_path):
    """Pictures of dense models are stretched to it, whatever the first one's shape."""
    torch.manual_seed(0)
    options = {"backbone": "vmamba_femto", "num_classes": 3, "channels": 8, "img_size": (48, 64)}
    model = vmamba.create_model("upernet", **options).eval()
    pictures = _pictures(10)
    path = tmp_path / "whole.onnx"
    export_onnx(model, path, sizes="batch")
    written = quantize(path, tmp_path / "int8.onnx", pictures, tolerance=0.5)  # the file says it itself
    assert (written.calibrated, written.checked) == (8, 2)
    assert 1e-4 < written.mean < 0.3
    with pytest.raises(DataError, match="tensors are 40 high and 64 wide, and the network takes 48 and 64 alone"):
        quantize(path, tmp_path / "int8.onnx", [torch.randn(3, 40, 64) for _ in range(9)])
    ramp = np.broadcast_to(np.linspace(0, 255, 90).astype(np.uint8)[:, None], (40, 90, 3)).copy()
    for fitted, widest in ((True, 247), (False, 184)):  # stretched whole, or cropped
        found = gather([ramp] * 8, 3, Preprocessing((32, 16), crop_pct=1.0), 6, 2, fitted=fitted, only=(16, 16))
        assert found.seen.shape == (6, 3, 16, 16)
        assert int(found.seen.max()) == pytest.approx(widest, abs=10)


def test_torch_programs_of_one_size(tmp_path):
    """With operators that Python has signs for, of a dense model's head."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    options = {"backbone": "vmamba_femto", "num_classes": 3, "channels": 8, "img_size": (48, 64)}
    model = vmamba.create_model("upernet", **options).eval()
    written = quantize(model, tmp_path / "int8", _pictures(8), format="torch", sizes="batch", tolerance=0.5)
    assert 1e-4 < written.mean < 0.3
    module, _ = load_quantized(written.path)
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        assert module(images).shape == model(images).shape == (2, 3, 48, 64)


def test_a_detector_of_one_size(tmp_path):
    torch.manual_seed(0)
    options = {"backbone": "vmamba_femto", "num_classes": 3, "channels": 8, "hidden": 16, "img_size": (48, 64)}
    model = vmamba.create_model("maskrcnn", score_thr=0.3, **options).eval()
    for layer in (model.rpn_head.rpn_cls, model.rpn_head.rpn_reg, model.roi_head.bbox_head.fc_cls):
        nn.init.normal_(layer.weight, std=0.5)
    written = quantize(model, tmp_path / "int8.onnx", _pictures(8), sizes="batch", tolerance=0.9)
    boxes, *_ = _run(written.path, np.random.default_rng(1).standard_normal((2, 3, 48, 64), np.float32))
    assert len(boxes)


def test_torch_programs(tmp_path):
    pytest.importorskip("torchao")
    model = _small()
    model.stages[0].blocks[0].mlp.act = nn.Tanh()
    path = tmp_path / "int8.pt2"
    written = quantize(model, path, _pictures(), format="torch", class_names=NAMES, tolerance=0.05)
    assert written.layers == PRODUCTS
    assert 1e-4 < written.mean < 0.05
    assert list(tmp_path.iterdir()) == [path]
    module, metadata = load_quantized(path)
    assert metadata["class_names"] == NAMES
    assert metadata["quantization"]["calibrated_on"] == 18
    assert metadata["preprocessing"]["img_size"] == [24, 24]
    images = torch.randn(3, 3, 20, 36)
    with torch.no_grad():
        expected = model(images)
        assert (module(images) - expected).abs().max() < 0.2 * expected.abs().max()
    weights = [tensor for _, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.ndim >= 2]
    assert sum(tensor.dtype == torch.int8 for tensor in weights) == PRODUCTS
    # What is left in float32: the convolutions that are not quantised and the scans' parameters.
    assert sum(tensor.dtype == torch.float32 for tensor in weights) == sum(
        parameter.ndim >= 2 for parameter in model.parameters()
    ) - PRODUCTS  # fmt: skip
    targets = [str(node.target) for node in module.graph.nodes]
    assert targets.count("vmamba.ss2d_scan.default") == 2
    with pytest.raises(ExportError, match="quantised already"):
        quantize(module, tmp_path / "again.pt2", [torch.randn(3, 24, 24) for _ in range(9)], format="torch")
    with pytest.raises(ExportError, match="give the file of weights"):
        quantize(path, tmp_path / "again.onnx", _pictures())
    (tmp_path / "text.pt2").write_text("text")
    with pytest.raises(ExportError, match="cannot be read as a torch program"):
        load_quantized(tmp_path / "text.pt2")


def test_any_number_of_channels_as_tensors(tmp_path):
    model = _small(in_chans=5)
    with pytest.raises(DataError, match=r"takes 5 channels, and pictures have 1 or 3; give tensors"):
        quantize(model, tmp_path / "int8.onnx", _pictures())
    tensors = [torch.randn(5, 24, 24) for _ in range(12)]
    with pytest.raises(DataError, match=r"a tensor is float32 \(4, 24, 24\); expected float32 \(5, H, W\)"):
        quantize(model, tmp_path / "int8.onnx", [tensor[:4] for tensor in tensors])
    with pytest.raises(DataError, match="several sizes"):
        quantize(model, tmp_path / "int8.onnx", [*tensors, torch.randn(5, 20, 24)])
    assert list(tmp_path.iterdir()) == []
    written = quantize(model, tmp_path / "int8.onnx", tensors)
    assert (written.calibrated, written.checked, written.layers) == (9, 3, PRODUCTS)


def _folder(path, pictures):
    path.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(path / f"{index}.png")
    return path


def test_pictures_in_folders(tmp_path):
    for split, count in (("train", 5), ("val", 4)):
        for name in "ab":
            _folder(tmp_path / "data" / split / name, _pictures(count))
    (tmp_path / "data/train/a/torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    pre = Preprocessing((24, 24), 1, (0.5,), (0.5,))
    training = open_pictures(str(tmp_path / "data"))
    assert training == [str(tmp_path / "data/train")]  # of the training split alone
    found = gather(training, 1, pre, 100, 100)
    assert (len(found.seen), len(found.held_back), len(found.skipped)) == (8, 2, 1)
    assert "torn.png" in found.skipped[0]
    assert found.seen.shape[1:] == (1, 24, 24)
    assert torch.equal(gather(tmp_path / "data", 1, pre, 100, 100).seen, found.seen)
    _folder(tmp_path / "plain/training/of-one-day", _pictures(6))  # and pictures without classes
    _folder(tmp_path / "plain/validation", _pictures(9))
    for index, picture in enumerate(_pictures(4)):
        Image.fromarray(picture).save(tmp_path / f"plain/training/{index}.png")
    plain = gather(tmp_path / "plain", 1, pre, 100, 100)
    assert (len(plain.seen), len(plain.held_back), plain.skipped) == (8, 2, ())
    every = gather([tmp_path / "data/val", tmp_path / "data/train/b/*.png", _pictures(1)[0], tmp_path / "none"], 1, pre,
                   3, 6)  # fmt: skip
    assert (len(every.seen), len(every.held_back)) == (3, 6)
    assert "no such file" in every.skipped[0]
    many = gather(np.stack(_pictures(37)), 1, pre, 33, 4)
    assert [len(batch) for batch in many.batches(many.seen, "")] == [33]  # and none of a single picture
    assert [len(batch) for batch in many.batches(torch.zeros(70, 1, 24, 24), "")] == [32, 32, 6]
    with pytest.raises(DataError, match="fashion_mnist"):
        open_pictures(str(tmp_path / "data"), "torch/fashion_mnist")


def test_refusals(whole, eighth, tmp_path, monkeypatch):
    path, pictures = tmp_path / "int8.onnx", _pictures()
    path.write_bytes(b"before")
    torn = tmp_path / "torn.png"
    torn.write_text("no picture")
    (tmp_path / "empty").mkdir()
    for few, message in (
        (pictures[:1], r"^1 pictures can be used; at least 8"),
        (pictures[:7], r"^7 pictures"),
        ([*pictures[:7], torn], r"^7 pictures can be used, and 1 cannot \(.*torn.png: "),
        ([], r"^0 pictures"),
        (tmp_path / "none", r"none: no such file or folder$"),
        (tmp_path / "empty", r"empty: no image files \(.*\)\. Of a data set .* \(--dataset torch/fashion_mnist\)"),
    ):
        with pytest.raises(DataError, match=message):
            quantize(whole, path, few)
    with pytest.raises(DataError, match=r"4 \+ 1 pictures are too few"):
        quantize(whole, path, pictures, samples=4, held_back=1)
    with pytest.raises(
        DataError, match=r"1 \+ 8 pictures are too few: at least 8, 2 of them to calibrate with and 2 held"
    ):
        quantize(whole, path, pictures, samples=1, held_back=8)
    with pytest.raises(TypeError, match="expected uint8"):
        quantize(whole, path, [np.zeros((8, 8, 4), np.uint8)] * 9)
    with pytest.raises(ExportError, match=r"not written: on 6 pictures .*root mean square.* 0.1% is accepted"):
        quantize(whole, path, pictures, tolerance=1e-3)
    with pytest.raises(ExportError, match=r"no matrix product or convolution to quantise beside"):
        quantize(whole, path, pictures, exclude=["*"])
    program = path.with_suffix(".pt2")
    for source, target in ((whole, path), (_small(), program)):
        format = "torch" if target == program else "onnx"
        with pytest.raises(ExportError, match=r"no layer .* fits exclude=\['haed\*'\]; they are called head"):
            quantize(source, target, pictures, format=format, exclude=["haed*", "stem*"])
    with pytest.raises(ExportError, match=r"whole.onnx has the inputs that it was exported with; give embed and sizes"):
        quantize(whole, path, pictures, sizes="batch")
    with pytest.raises(ExportError, match=r"whole.onnx is what the model is read from; give the new file another name"):
        quantize(whole, whole, pictures)
    with pytest.raises(ExportError, match="quantised already"):
        quantize(eighth[1].path, path, pictures)
    with pytest.raises(ExportError, match="cannot be read as an ONNX file"):
        quantize(torn.rename(tmp_path / "torn.onnx"), path, pictures)
    with pytest.raises(ExportError, match="no such file"):
        quantize(tmp_path / "none.onnx", path, pictures)
    with pytest.raises(ExportError, match="is an ONNX file"):
        quantize(whole, program, pictures, format="torch")
    with pytest.raises(ExportError, match="embed is for ONNX"):
        quantize(whole, program, pictures, format="torch", embed=True)
    with pytest.raises(CheckpointError, match="has no published weights"):
        quantize("vmamba_femto", path, pictures)
    detector = vmamba.create_model("maskrcnn", backbone="vmamba_femto", num_classes=2, channels=8, hidden=8)
    with pytest.raises(ExportError, match="for which ONNX alone has a graph, in float32, float16 or int8"):
        quantize(detector, program, pictures, format="torch")
    with pytest.raises(ExportError, match="no matrix product"):
        quantize(nn.ReLU(), path, [torch.randn(3, 8, 8) for _ in range(8)])
    strange = onnx.load(whole)
    onnx.helper.set_model_props(strange, {"preprocessing": "{"})
    onnx.save(strange, tmp_path / "torn.onnx")
    with pytest.raises(ExportError, match=r'the "preprocessing" in .*torn.onnx cannot be read: .*Give preprocessing='):
        quantize(tmp_path / "torn.onnx", path, pictures)
    onnx.helper.set_model_props(strange, {})
    onnx.save(strange, tmp_path / "torn.onnx")
    with pytest.raises(DataError, match="nothing says how pictures become the network's inputs"):
        quantize(tmp_path / "torn.onnx", path, pictures)
    half = onnx.load(whole)
    half.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.zeros(3, np.float16), "half"))
    onnx.save(half, tmp_path / "half.onnx")
    with pytest.raises(ExportError, match="float16"):
        quantize(tmp_path / "half.onnx", path, pictures)
    assert path.read_bytes() == b"before"
    with pytest.raises(ExportError, match="is no folder"):
        quantize(whole, tmp_path / "none" / "int8.onnx", pictures)
    for missing, format in (("onnxruntime.quantization", "onnx"), ("torchao.quantization.pt2e.quantize_pt2e", "torch")):
        for module in ("int8_onnx", "int8_torch"):
            monkeypatch.delitem(sys.modules, f"vmamba.deploy.{module}", raising=False)
            monkeypatch.delattr(f"vmamba.deploy.{module}", raising=False)
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ImportError, match=r"pip install \"vmamba\["):
            quantize(_small(), path if format == "onnx" else program, pictures, format=format)
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["half.onnx", "int8.onnx", "torn.onnx"]


@pytest.mark.parametrize(
    ("layer", "kind", "weight", "chosen"),
    [
        ("stem.conv1", "torch.nn.modules.conv.Conv2d", (32, 3, 3, 3), False),
        ("stem.conv2", "vmamba.nn.layers.GridConv2d", (64, 32, 3, 3), True),
        ("stages.0.blocks.0.ss2d.conv", "vmamba.nn.layers.ConvSiLU", (96, 1, 3, 3), False),
        ("stages.0.blocks.0.ss2d", "vmamba.nn.ss2d.SS2D", (96, 32), False),
        ("stages.0.blocks.0.ss2d.in_proj", "vmamba.nn.layers.Linear", (96, 96), True),
        ("stages.0.blocks.0.mlp.fc1", "vmamba.nn.layers.Linear", (4, 4), True),
        ("head.fc", "Linear", (768, 1000), False),
        ("rpn_head.rpn_cls", "torch.nn.modules.conv.Conv2d", (3, 256, 1, 1), False),
        ("roi_head.bbox_head.fc_reg", "vmamba.nn.layers.Linear", (320, 1024), False),
    ],
)
def test_which_layers(layer, kind, weight, chosen):
    assert (computes_in_int8(layer, kind, weight) and not is_excluded(layer, ["head.*"])) == chosen


@pytest.mark.parametrize(
    ("machine", "vnni", "reduced"),
    [("x86_64", False, True), ("AMD64", False, True), ("x86_64", True, False), ("aarch64", False, False)],
)
def test_7_bits_are_for_processors_that_would_overflow(machine, vnni, reduced, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: vnni)
    assert _overflows() == reduced


def test_command(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(vmamba.create_model("vmamba_femto", num_classes=2, img_size=28), "model.safetensors",
                    metadata={"class_names": ["cat", "dog"]})  # fmt: skip
    _folder(tmp_path / "photos", _pictures(12))
    (tmp_path / "photos/torn.png").write_text("no picture")
    arguments = ["--output", "int8.onnx", "--data", "photos", "--exclude", "stem*", "head*"]
    assert main(["quantize", "model.safetensors", *arguments]) == 0
    told = capsys.readouterr().err
    assert "torn.png: not an image" in told
    assert "layers in int8" in told
    assert "calibrated on 9 images; on 3 others it differs from the float32 model by" in told
    assert json.loads(_metadata(onnx.load("int8.onnx"))["class_names"]) == ["cat", "dog"]
    assert main(["quantize", "int8.onnx", "--output", "again.onnx", "--data", "photos"]) == 1
    assert "quantised already" in capsys.readouterr().err
    kwargs = {"backbone": "vmamba_femto", "channels": 8, "hidden": 8}
    save_checkpoint(vmamba.create_model("maskrcnn", num_classes=2, **kwargs), "detector.safetensors",
                    metadata={"model_kwargs": kwargs})  # fmt: skip
    for data in ("photos", "none"):  # the model is complained of before the data
        arguments = ["detector.safetensors", "--format", "torch", "--output", "int8.pt2", "--data", data]
        assert main(["quantize", *arguments]) == 1
        assert "for which ONNX alone has a graph" in capsys.readouterr().err
