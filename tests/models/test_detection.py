from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from models.dense import (
    DETECTION,
    Fixed,
    assert_close,
    assert_map,
    case_of,
    draw,
    fixed_backbone,
    golden_weights,
    unpacked,
    write_openmmlab,
)
from torch import Tensor

import vmamba
from vmamba.models import boxes as bx
from vmamba.models.detection import MaskRCNN

Restored = Callable[[str], MaskRCNN]
SIZES = ((160, 224), (120, 200))  # of the two pictures on the fixed backbone, without padding


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Restored:
    """Models by name, each with the golden weights read from a file in the released format."""
    models: dict[str, MaskRCNN] = {}

    def get(name: str) -> MaskRCNN:
        if name not in models:
            path = write_openmmlab(tmp_path_factory.mktemp("released") / "weights.pth", golden_weights(name))
            models[name] = vmamba.create_model(name, checkpoint=path).eval()
            path.unlink()
        return models[name]

    return get


def assert_detections(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> None:
    """The same detections in the same order; `low` holds near ties, so there they are a set."""
    order = slice(None)
    if prefix == "low":
        distance = (expected["low_bboxes"][:, None] - found["boxes"]).abs().sum(2)
        order = (distance + 1000 * (expected["low_labels"][:, None] != found["labels"])).argmin(1)
        assert len(set(order.tolist())) == len(order)
    assert len(found["boxes"]) == len(expected[f"{prefix}_bboxes"])
    assert_close(found["boxes"][order], expected[f"{prefix}_bboxes"], atol=5e-3)
    assert_close(found["scores"][order], expected[f"{prefix}_scores"])
    assert torch.equal(found["labels"][order], expected[f"{prefix}_labels"].long())
    if f"{prefix}_masks" in expected:
        wanted = unpacked(expected[f"{prefix}_masks"], expected[f"{prefix}_masks_shape"].tolist())
        assert found["masks"].dtype == torch.bool
        assert found["masks"].shape == wanted.shape
        assert (found["masks"] != wanted).sum() <= 1e-5 * wanted.numel()


@pytest.mark.parametrize("path", DETECTION, ids=lambda path: path.stem)
def test_numbers_are_those_of_mmdetection(path: Path, restored: Restored) -> None:
    name, images, size, expected = case_of(path)
    model = restored(name)
    with torch.inference_mode():
        maps = model.backbone(images)
        for i, x in enumerate(maps, start=1):
            assert_map(expected, f"stage{i}", x)
        pyramid = model.neck(maps)
        scores, deltas = zip(*(model.rpn_head(x) for x in pyramid), strict=True)
        anchors = [bx.anchors(x.shape[2:], stride) for x, stride in zip(pyramid, model.strides, strict=True)]
        proposals, probabilities = model.propose([s[0] for s in scores], [d[0] for d in deltas], anchors, size, 1000)
        assert len(proposals) == len(expected["proposals"])
        nearest = (expected["proposals"][:, None] - proposals).abs().sum(2).argmin(1)
        assert len(set(nearest.tolist())) == len(nearest)
        assert_close(proposals[nearest], expected["proposals"], atol=5e-3)
        assert_close(probabilities[nearest], expected["proposal_scores"])

        if "rois" in expected:
            for i, x in enumerate(pyramid):
                assert_map(expected, f"fpn{i}", x)
                assert_map(expected, f"rpn_cls{i}", scores[i].unflatten(1, (*x.shape[2:], -1)).permute(0, 3, 1, 2))
                assert_map(expected, f"rpn_reg{i}", deltas[i].view(1, *x.shape[2:], 12).permute(0, 3, 1, 2))
            seven, fourteen = (model.pool(pyramid, [expected["rois"]], side) for side in (7, 14))
            assert_map(expected, "roi7", seven)
            assert_map(expected, "roi14", fourteen)
            logits, moves = model.roi_head.bbox_head(seven)
            assert_close(logits, expected["roi_cls"])
            assert_close(moves.flatten(1), expected["roi_deltas"])
            masks = model.roi_head.mask_head(fourteen)
            assert_close(masks[:, ::16], expected["roi_mask_every16"])
            assert_close(masks[[0, 3]], expected["roi_mask_logits"])
            assert_close(masks.mean((2, 3)), expected["roi_mask_mean"])

        (found,) = model(images, sizes=[size])
        assert found["scores"].diff().max() <= 0
        assert_detections(found, expected, "det")
        own = model.roi_head.mask_head(model.pool(pyramid, [found["boxes"]], 14))
        own = own[torch.arange(len(own)), found["labels"]]
        assert_close(own[:12], expected["det_mask_logits"], atol=2e-3)
        assert_close(own.mean((1, 2)), expected["det_mask_mean"], atol=2e-3)

        if "low_bboxes" in expected:
            model.score_thr = 0.03
            (found,) = model(images)
            model.score_thr = 0.05
            assert_detections(found, expected, "low")
            (found,) = model(images, file_sizes=[expected["resc_ori_shape"].tolist()])
            assert_detections(found, expected, "resc")


def small(masks: bool = True) -> MaskRCNN:
    """Narrow heads with known numbers, on known maps."""
    model = MaskRCNN(fixed_backbone(), 7, channels=32, masks=masks, hidden=64, out_norm=False).eval()
    for name, tensor in model.state_dict().items():
        tensor.copy_(draw(name, tensor.shape, std=0.05))
    return model


def targets() -> list[dict[str, Tensor]]:
    """Six and three boxes with noise for masks."""
    rng, made = np.random.RandomState(3), []
    for (height, width), count in zip(SIZES, (6, 3), strict=True):
        corner = rng.rand(count, 2) * [0.6 * width, 0.6 * height]
        boxes = np.concatenate([corner, corner + 6 + rng.rand(count, 2) * [0.35 * width, 0.35 * height]], 1)
        labels, masks = rng.randint(0, 7, count), rng.rand(count, 160, 224) > 0.45
        made.append(
            {
                "boxes": torch.from_numpy(boxes.astype(np.float32)),
                "labels": torch.from_numpy(labels),
                "masks": torch.from_numpy(masks),
            }
        )
    return made


def values(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: loss.item() for name, loss in losses.items()}


def test_losses_and_gradients_are_those_of_mmdetection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randperm", lambda count, device=None: torch.arange(count, device=device))
    model = small()
    losses = model(torch.zeros(2, 3, 160, 224), targets(), sizes=SIZES)
    # mmdetection 3.3.0 with the published models' config, on the same maps, weights, targets and draws.
    expected = {"rpn_cls": 0.6610178, "rpn_reg": 0.0712559, "cls": 2.1686337, "reg": 0.0323201, "mask": 0.6924773}
    assert values(losses) == pytest.approx(expected, abs=2e-6)
    sum(losses.values()).backward()
    norms = {
        "neck.lateral_convs.0.conv.weight": 0.041963,
        "rpn_head.rpn_conv.weight": 0.261712,
        "roi_head.bbox_head.fc_reg.weight": 0.025823,
        "roi_head.mask_head.conv_logits.weight": 0.006924,
    }
    for name, norm in norms.items():
        assert model.get_parameter(name).grad.norm().item() == pytest.approx(norm, abs=2e-6), name


def test_proposals_are_matched_before_the_true_boxes_join_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an object's best proposal is for it, as in mmdetection, though it overlaps with another even more."""
    truths = torch.tensor([[0.0, 0, 100, 100], [30, 0, 130, 100]])
    proposed = torch.tensor([[20.0, 0, 120, 100], [30, 0, 128, 100], [300, 300, 310, 310]])
    overlaps = bx.box_iou(truths, proposed)
    assert overlaps[0].argmax() == 0
    assert overlaps[1, 0] > overlaps[0, 0] > 0.5

    class MatchedError(Exception):
        pass

    def sample(matched: Tensor, count: int, positives: float) -> None:
        raise MatchedError(matched.tolist())

    monkeypatch.setattr(bx, "sample", sample)
    model = vmamba.create_model("maskrcnn", backbone="vmamba_femto", channels=8, hidden=16, num_classes=2)
    for given, expected in ((proposed, [0, 1, 0, 1, bx.NEGATIVE]), (proposed[:0], [0, 1])):
        with pytest.raises(MatchedError) as caught:
            model._roi_losses([], [given], [{"boxes": truths, "labels": torch.tensor([0, 1])}])
        assert caught.value.args == (expected,)


def test_matches_and_samples_are_by_mmdetections_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[tuple[float, ...]]] = {"match": [], "sample": []}
    match, sample = bx.match, bx.sample
    monkeypatch.setattr(bx, "match", lambda *given: asked["match"].append(given[2:]) or match(*given))
    monkeypatch.setattr(bx, "sample", lambda *given: asked["sample"].append(given[1:]) or sample(*given))
    small()(torch.zeros(2, 3, 160, 224), targets(), sizes=SIZES)
    assert asked["match"] == [(0.7, 0.3, 0.3)] * 2 + [(0.5, 0.5, 0.5)] * 2
    assert asked["sample"] == [(256, 0.5)] * 2 + [(512, 0.25)] * 2


def test_anchors_take_part_up_to_the_padding_of_their_own_picture() -> None:
    """To a multiple of 32, not of the stride of the map that only proposals are made on."""
    model = small()
    maps = [torch.zeros(1, 32, 128 // stride, 160 // stride) for stride in (4, 8, 16, 32)]
    maps.append(maps[-1][:, :, ::2, ::2])
    inside = model._inside(maps, (33, 90)).split([3 * x.shape[2] * x.shape[3] for x in maps])
    for within, x, (rows, columns) in zip(inside, maps, ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2)), strict=True):
        expected = torch.zeros(*x.shape[2:], 3, dtype=torch.bool)
        expected[:rows, :columns] = True
        assert torch.equal(within, expected.flatten())


def test_regions_are_pooled_from_the_map_on_which_they_are_14_to_28_cells_wide() -> None:
    strides = (2, 4, 8, 16)
    extractor = Fixed([torch.zeros(1, 8, 256 // stride, 256 // stride) for stride in strides], strides)
    model = MaskRCNN(extractor, 3, channels=8, hidden=8)
    maps = [torch.full((1, 8, 256 // stride, 256 // stride), float(stride)) for stride in (*strides, 32)]
    boxes = torch.tensor([[0.0, 0, side, side] for side in (9, 54, 58, 110, 114, 220, 230)])
    assert model.pool(maps, [boxes], 7)[:, 0, 3, 3].tolist() == [2, 2, 4, 4, 8, 8, 16]


def test_boxes_without_masks_train_the_boxes_alone() -> None:
    images, both = torch.zeros(2, 3, 160, 224), targets()
    for target in both:
        del target["masks"]
    model = small()
    torch.manual_seed(0)
    without = model(images, both, sizes=SIZES)
    assert without.keys() == {"rpn_cls", "rpn_reg", "cls", "reg"}
    torch.manual_seed(0)
    full = model(images, targets(), sizes=SIZES)
    assert values(without) == pytest.approx({name: loss for name, loss in values(full).items() if name != "mask"})
    torch.manual_seed(0)
    # One picture's masks are unknown: the mask loss is that of the other.
    half = [targets()[0], both[1]]
    assert model(images, half, sizes=SIZES)["mask"].item() == pytest.approx(0.693, abs=0.01)

    boxes_only = small(masks=False)
    assert boxes_only(images, targets(), sizes=SIZES).keys() == {"rpn_cls", "rpn_reg", "cls", "reg"}
    assert boxes_only(images)[0].keys() == {"boxes", "scores", "labels"}


def test_the_heads_learn_of_as_many_regions_as_are_asked_for() -> None:
    model, counts = small(masks=False).train(), []
    model.regions = 24
    model.roi_head.bbox_head.register_forward_hook(lambda _, inputs, output: counts.append(len(inputs[0])))
    model(torch.randn(2, 3, 64, 96), [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([0])}] * 2)
    assert counts == [2 * 24]


def test_pictures_without_objects() -> None:
    images = torch.zeros(2, 3, 160, 224)
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    model = small()
    losses = model(images, [{**nothing, "masks": torch.zeros(0, 160, 224, dtype=torch.bool)}] * 2)
    assert losses["rpn_reg"] == losses["reg"] == 0
    assert losses["rpn_cls"] > 0
    assert losses["cls"] > 0
    assert "mask" not in losses
    sum(losses.values()).backward()
    model.score_thr = 1.0
    for found in model(images, sizes=SIZES, file_sizes=((80, 112), (60, 100))):
        assert [found[key].shape[0] for key in ("boxes", "scores", "labels", "masks")] == [0] * 4
    assert found["masks"].shape == (0, 60, 100)


def test_a_batch_gives_what_its_pictures_give_alone() -> None:
    model = small()
    model.roi_head.bbox_head.fc_cls.weight.data.mul_(30)
    together = model(torch.zeros(2, 3, 160, 224), sizes=SIZES, file_sizes=((201, 333), (77, 170)))
    assert [len(found["boxes"]) for found in together] == [100, 100]
    maps = model.backbone.extractor.maps
    for i, file_size in enumerate(((201, 333), (77, 170))):
        model.backbone.extractor.maps = [x[i : i + 1] for x in maps]
        (alone,) = model(torch.zeros(1, 3, 160, 224), sizes=SIZES[i : i + 1], file_sizes=[file_size])
        assert alone["masks"].shape[1:] == file_size
        assert_close(alone["boxes"], together[i]["boxes"], atol=1e-3)
        assert torch.equal(alone["labels"], together[i]["labels"])
        limits = torch.tensor([file_size[1], file_size[0]] * 2) + 1e-3
        assert (alone["boxes"] >= 0).all()
        assert (alone["boxes"] <= limits).all()
    model.max_per_img = 7
    assert len(model(torch.zeros(1, 3, 160, 224))[0]["boxes"]) == 7


def test_what_scores_less_than_is_asked_for_is_left_out_before_its_mask_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = vmamba.create_model("maskrcnn_vmamba_femto", num_classes=3, channels=8, hidden=16, score_thr=0.0).eval()
    images, pasted = torch.randn(2, 3, 64, 96), list[int]()
    paste = bx.paste_masks
    monkeypatch.setattr(bx, "paste_masks", lambda masks, *rest: pasted.append(len(masks)) or paste(masks, *rest))
    with torch.no_grad():
        everything = model(images)
        least = float(everything[0]["scores"][7])  # itself among them
        some = model(images, least_score=least)
    for all_of_it, found in zip(everything, some, strict=True):
        kept = all_of_it["scores"] >= least
        assert found.keys() == all_of_it.keys()
        for name, values in found.items():
            torch.testing.assert_close(values, all_of_it[name][kept])
    assert pasted[2:] == [len(found["scores"]) for found in some]
    assert 8 <= pasted[2] < pasted[0]


def test_a_small_model_learns_two_pictures() -> None:
    torch.manual_seed(0)
    model = MaskRCNN(vmamba.create_model("vmamba_femto", features_only=True), 2, channels=32, hidden=64)
    images, boxes = torch.zeros(2, 3, 48, 48), torch.tensor([[4.0, 6, 24, 22], [22, 20, 44, 46]])
    masks, labels = torch.zeros(2, 48, 48, dtype=torch.bool), torch.tensor([0, 1])
    masks[0, 6:22, 4:24] = True
    masks[1, 20:46, 22:44] = torch.ones(26, 22).tril().bool()
    images[0, 0], images[:, 1] = masks[0].float() * 3, masks[1].float() * 3
    batch = [{"boxes": boxes, "labels": labels, "masks": masks}, {"boxes": boxes[1:], "labels": labels[1:]}]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    totals = []
    for _ in range(60):
        losses = model(images, batch)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.2 * totals[0]
    with torch.inference_mode():
        first, second = model.eval()(images)
    for found, label in ((first, 0), (first, 1), (second, 1)):
        best = (found["labels"] == label).nonzero()[0]
        assert bx.box_iou(found["boxes"][best], boxes[label : label + 1]).item() > 0.7
        mask = found["masks"][best]
        assert (mask & masks[label]).sum() / (mask | masks[label]).sum() > 0.7


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("vmamba_femto", {}),
        ("vmamba_pico_s2", {}),
        ("swin_tiny_patch4_window7_224", {"strict_img_size": False, "embed_dim": 24, "depths": (1, 1, 1, 1)}),
        ("convnext_atto", {}),
        ("resnet18", {"out_indices": (1, 2, 3, 4)}),
    ],
)
def test_any_backbone_whose_maps_halve_carries_it(backbone: str, options: dict[str, object]) -> None:
    model = MaskRCNN(timm.create_model(backbone, features_only=True, **options), 5, channels=16, hidden=16).eval()
    model.score_thr = 0.0
    with torch.inference_mode():
        found = model(torch.randn(2, 3, 64, 96), sizes=[(50, 70), (64, 96)], file_sizes=[(100, 140), (32, 48)])
    assert [len(one["boxes"]) for one in found] == [100, 100]
    assert [tuple(one["masks"].shape) for one in found] == [(100, 100, 140), (100, 32, 48)]
    for one, (height, width) in zip(found, ((100, 140), (32, 48)), strict=True):
        assert (one["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match=r"strides \[16, 16, 16\]; detection needs each to be twice the one before"):
        MaskRCNN(timm.create_model("vit_tiny_patch16_224", features_only=True), 5)
    model, images = small(), torch.zeros(2, 3, 160, 224)
    with pytest.raises(ValueError, match="1 targets for 2 images; expected one each"):
        model(images, targets()[:1])
    with pytest.raises(ValueError, match="3 sizes for 2 images"):
        model(images, sizes=[(160, 224)] * 3)


def test_the_layers_that_answer_begin_as_small_as_mmdetections() -> None:
    torch.manual_seed(0)
    model = MaskRCNN(fixed_backbone(), 80, channels=32, hidden=64)
    rpn, box, mask = model.rpn_head, model.roi_head.bbox_head, model.roi_head.mask_head
    for layer, std in ((rpn.rpn_cls, 0.01), (rpn.rpn_reg, 0.01), (box.fc_cls, 0.01), (box.fc_reg, 0.001)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.3)
    # Kaiming's numbers, by what torch takes for the outputs of each.
    assert mask.conv_logits.weight.std().item() == pytest.approx((2 / 80) ** 0.5, rel=0.1)
    assert mask.upsample.weight.std().item() == pytest.approx((2 / (32 * 4)) ** 0.5, rel=0.1)
    for layer in (rpn.rpn_conv, rpn.rpn_cls, rpn.rpn_reg, box.fc_cls, box.fc_reg, mask.conv_logits, mask.upsample):
        assert not layer.bias.any()


def test_half_precision_finds_the_same() -> None:
    model = small()
    model.roi_head.bbox_head.fc_cls.weight.data.mul_(30)
    images = torch.zeros(2, 3, 160, 224)
    full = model(images, sizes=SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(images, sizes=SIZES)
        losses = model(images, targets(), sizes=SIZES)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    model.to(torch.bfloat16).backbone.extractor.maps = [x.bfloat16() for x in model.backbone.extractor.maps]
    for other in (cast, model(images.bfloat16(), sizes=SIZES)):
        for one, expected in zip(other, full, strict=True):
            assert one["boxes"].dtype == one["scores"].dtype == torch.float32
            overlaps = bx.box_iou(expected["boxes"][:20], one["boxes"]).amax(1)
            assert overlaps.median() > 0.8
