"""Detection in ONNX: the network and what it does behind it, in ONNX Runtime, against the model."""

from __future__ import annotations

import pytest
import torch

import vmamba
from vmamba.cli import main
from vmamba.deploy import detection, export_onnx
from vmamba.deploy.export import graph_preprocessing
from vmamba.deploy.graphs import Images
from vmamba.errors import ExportError
from vmamba.models.checkpoints import save_checkpoint
from vmamba.tasks.detector import Detector
from vmamba.tasks.inference import detect, filled_up
from vmamba.tasks.prediction import Weights

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def _detector(**options):
    """Random weights whose scores lie apart, so that rounding decides nothing."""
    torch.manual_seed(0)
    options = {"backbone": "vmamba_femto", "num_classes": 3, "channels": 8, "hidden": 16, "img_size": 64} | options
    model = vmamba.create_model("maskrcnn", **options).eval()
    for layer in (model.rpn_head.rpn_cls, model.rpn_head.rpn_reg, model.roi_head.bbox_head.fc_cls):
        torch.nn.init.normal_(layer.weight, std=0.5)
    torch.nn.init.normal_(model.roi_head.bbox_head.fc_reg.weight, std=0.1)
    return model


def _run(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == list(detection.OUTPUTS)[: len(session.get_outputs())]
    return [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = _detector(score_thr=0.3, max_per_img=20)
    path = tmp_path_factory.mktemp("detection") / "model.onnx"
    written = export_onnx(model, path, class_names=["cat", "dog", "树"])
    assert max(written.differences.values()) <= 2e-2
    assert written.detections > 0
    return model, path


def test_detections_are_the_models(made):
    """In batches of pictures that the graph was not traced with."""
    model, path = made
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 20)]
    kinds = {node.op_type for node in proto.graph.node}
    assert {"NonMaxSuppression", "RoiAlign", "TopK"} <= kinds
    for shape in ((1, 3, 64, 96), (3, 3, 101, 70)):
        images = torch.randn(shape)
        with torch.no_grad():
            found = model(filled_up(images), sizes=[shape[2:]] * len(images))
        expected = detection.in_rows(found)
        assert len(expected[0]) > 5 * shape[0]
        got = _run(path, images)
        assert got[4].dtype == torch.bool
        assert got[4].shape[1:] == shape[2:]
        assert detection.unmatched(got, expected) <= 0.02
        for picture, one in enumerate(found):
            here = got[3] == picture
            assert abs(int(here.sum()) - len(one["scores"])) <= 1
            assert (got[1][here].diff() <= 0).all()


def test_nothing_found(tmp_path, capsys):
    save_checkpoint(_detector(score_thr=1.0), tmp_path / "model.safetensors")
    assert main(["export", str(tmp_path / "model.safetensors"), "--output", str(tmp_path / "model.onnx")]) == 0
    assert "the model finds nothing in the noise that it was checked on" in capsys.readouterr().err
    got = _run(tmp_path / "model.onnx", torch.randn(2, 3, 64, 64))
    assert [tuple(value.shape) for value in got] == [(0, 4), (0,), (0,), (0,), (0, 64, 64)]


def test_what_pictures_are_fitted_into_is_what_predict_takes():
    published = vmamba.create_model("maskrcnn", backbone="vmamba_femto", num_classes=3, channels=8, hidden=8)
    for model in (published, _detector(img_size=(64, 100))):
        told = graph_preprocessing(model, Images.of(model, is_open=True), None)
        assert told.img_size == Detector.from_weights(Weights(model, {}, "")).sides


def _found_in(model, pictures):
    """As `vmamba predict` finds it."""
    with torch.no_grad():
        return detection.in_rows(detect(model, list(pictures), scale=pictures.shape[2:]))


def test_boxes_alone_from_pictures(tmp_path):
    model, path = _detector(masks=False, score_thr=0.3), tmp_path / "model.onnx"
    export_onnx(model, path, embed=True)
    pictures = torch.randint(0, 256, (2, 3, 50, 91), dtype=torch.uint8)
    got = _run(path, pictures)
    assert len(got) == 4
    assert len(got[1]) > 10
    assert detection.unmatched(got, _found_in(model, pictures)) <= 0.02


def test_a_backbone_of_timms(tmp_path):
    backbone = {"backbone": "test_resnet", "out_norm": False, "out_indices": (2, 3)}
    model, path = _detector(**backbone, score_thr=0.3, max_per_img=20), tmp_path / "model.onnx"
    export_onnx(model, path)
    images = torch.randn(2, 3, 50, 91)
    with torch.no_grad():
        expected = detection.in_rows(model(filled_up(images), sizes=[(50, 91)] * 2))
    assert len(expected[0]) > 10
    assert detection.unmatched(_run(path, images), expected) <= 0.02


def test_half_precision(tmp_path):
    """Layers in float16; what enters and leaves the file is as in float32."""
    layers = {"depths": (1, 1), "dims": (16, 24)}
    model, path = _detector(**layers, score_thr=0.3, max_per_img=20), tmp_path / "half.onnx"
    written = export_onnx(model, path, half=True, embed=True)
    assert max(written.differences.values()) <= 0.1
    pictures = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    got = _run(path, pictures)
    expected = _found_in(model, pictures)
    assert len(expected[0]) > 10
    assert [value.dtype for value in got] == [value.dtype for value in expected]
    assert detection.unmatched(got, expected, score=1e-2, box=0.95, mask=0.9) <= 0.1
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    kernels = [value for value in proto.graph.initializer if value.name.endswith("weight") and len(value.dims) == 4]
    assert len(kernels) > 10
    assert {kernel.data_type for kernel in kernels} == {onnx.TensorProto.FLOAT16}


def test_what_counts_as_the_same():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 25, 25]])
    masks = torch.zeros(2, 30, 30, dtype=torch.bool)
    masks[0, :10, :10] = masks[1, 5:25, 5:25] = True
    rows = [boxes, torch.tensor([0.9, 0.8]), torch.tensor([1, 2]), torch.tensor([0, 0]), masks]
    assert detection.unmatched([value.numpy() for value in rows], rows) == 0.0
    assert detection.unmatched([value.flip(0) for value in rows], rows) == 0.0
    assert detection.unmatched([value[:1] for value in rows], rows) == pytest.approx(1 / 3)
    for place, change in enumerate((boxes + 1, rows[1] + 0.01, rows[2] + 1, rows[3] + 1, ~masks)):
        assert detection.unmatched([*rows[:place], change, *rows[place + 1 :]], rows) == 1.0
    assert detection.unmatched([value[:0] for value in rows], [value[:0] for value in rows]) == 0.0


def test_how_far_two_models_are_apart():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 25, 25], [0, 0, 10, 9]])
    masks = torch.zeros(3, 30, 30, dtype=torch.bool)
    masks[0, :10, :10] = masks[1, 5:25, 5:25] = masks[2, :9, :10] = True
    rows = [boxes, torch.tensor([0.75, 0.5, 0.25]), torch.tensor([1, 2, 1]), torch.tensor([0, 0, 1]), masks]

    def apart(found):
        counts, scores, paired = detection.drift([value.numpy() for value in found], rows)
        assert scores.tolist() == [*found[1].tolist(), 0.75, 0.5, 0.25]
        return counts.tolist(), paired

    nothing = [0.0] * 3
    assert apart(rows) == (nothing + nothing, 6)
    assert apart([value.flip(0) for value in rows]) == (nothing + nothing, 6)
    assert apart([rows[0] + 1, rows[1] - 0.125, *rows[2:]]) == ([0.125] * 3 + nothing, 6)
    assert apart([value[:2] for value in rows]) == ([0, 0, 0, 0, 0.25], 4)
    assert apart([value[:0] for value in rows]) == ([0.75, 0.5, 0.25], 0)
    assert apart([boxes[[0, 0]], torch.tensor([0.5, 0.75]), torch.ones(2), torch.zeros(2), masks[[0, 0]]]) == (
        [0.5, 0, 0, 0.5, 0.25], 2  # of two in one place, the better one has the pair
    )  # fmt: skip
    for place, change in enumerate((boxes + 9, rows[1], rows[2] + 1, rows[3] + 2, ~masks)):
        if place != 1:
            changed = [*rows[:place], change, *rows[place + 1 :]]
            assert apart(changed) == ([0.75, 0.5, 0.25] * 2, 0)


def test_refusals(tmp_path):
    with pytest.raises(ExportError, match="is a model for detection"):
        vmamba.deploy.export_torch(_detector(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
