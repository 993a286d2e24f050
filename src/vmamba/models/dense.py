"""UPerNet and Mask R-CNN by name: the twenty published models, the same heads on every other variant, on any backbone.

`upernet_VARIANT` and `maskrcnn_VARIANT` are the published models of a variant (ADE20K at 512², 160k steps; COCO, 1×
schedule). Where there is a second file it has a suffix: `_3x` for the schedule of 36 epochs, `_bs8` for another run of
1×, with batches of 8.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from torch import nn

from vmamba.errors import CheckpointError
from vmamba.models.class_names import ADE20K, COCO
from vmamba.models.detection import MaskRCNN
from vmamba.models.folders import ModelFolder, is_source
from vmamba.models.registry import ENTRIES, Entry, create_model, register
from vmamba.models.segmentation import UPerNet
from vmamba.models.variants import VARIANTS, release_url

_FAMILIES: dict[str, tuple[type[UPerNet | MaskRCNN], tuple[int, int], tuple[str, ...]]] = {
    "upernet": (UPerNet, (512, 2048), ADE20K),  # the size that the published multiply-accumulates are for
    "maskrcnn": (MaskRCNN, (800, 1280), COCO),
}
_CLASSIFIERS = {
    "segmentation": ("decode_head.conv_seg", "auxiliary_head.conv_seg"),
    "detection": ("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits"),
}


def create(
    name: str,
    family: str,
    backbone: str = "vmamba_tiny_s1l8",
    num_classes: int | None = None,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    pretrained_backbone: bool = False,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> UPerNet | MaskRCNN:
    """Build a model of a family on a backbone, without weights for the heads.

    Args:
        name: what the model is called.
        family: "upernet" or "maskrcnn".
        backbone: any model of ours or timm's that gives feature maps, by its name, or by the folder it is in,
            "local-dir:FOLDER" or "hf-hub:OWNER/NAME". A file of the whole keeps the name and the arguments, and does
            not ask for the folder again.
        num_classes: number of classes; by default those of ADE20K or COCO.
        in_chans: channels of the images.
        img_size: height and width the model is meant for; any other works as well.
        pretrained_backbone: whether to download ImageNet weights for the backbone, or to take the folder's, from which
            training starts.
        pretrained_cfg_overlay: what differs from timm's configuration of the published models: "mean", "std", ...
        **kwargs: the network's, see `UPerNet` and `MaskRCNN`; all others are the backbone's: `drop_path_rate`,
            `out_indices`, ...

    Raises:
        CheckpointError: the folder holds no model, or none that gives feature maps.
    """
    network, size, class_names = _FAMILIES[family]
    of_heads = inspect.signature(network).parameters
    heads = {key: kwargs.pop(key) for key in list(kwargs) if key in of_heads}
    make, source = (create_model if is_source(backbone) else timm.create_model), backbone
    if is_source(source):
        backbone, arguments = _described(source)
        kwargs = arguments | kwargs
    extractor = make(source, pretrained=pretrained_backbone, features_only=True, in_chans=in_chans, **kwargs)
    model = network(extractor, len(class_names) if num_classes is None else num_classes, **heads)
    model.variant = name
    model.in_chans = in_chans
    height, width = to_2tuple(size if img_size is None else img_size)
    model.img_size = height, width
    model.class_names = class_names if model.num_classes == len(class_names) else None
    convs = (layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d))
    model.pretrained_cfg = {
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "input_size": (in_chans, *model.img_size),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "classifier": _CLASSIFIERS[network.task],
        "first_conv": next(convs),
        **(pretrained_cfg_overlay or {}),
    }
    given = {"backbone": backbone} if name == family or backbone != ENTRIES[name].backbone else {}
    model._model_args = {  # type: ignore[assignment]  # for timm's get_model_args
        **given,
        **heads,
        **kwargs,
    }
    return model


def _described(source: str) -> tuple[str, dict[str, Any]]:
    """The name of a folder's model and the arguments of its network.

    Raises:
        CheckpointError: it is no backbone.
    """
    folder = ModelFolder(source)
    name, arguments = folder.architecture, folder.metadata()["model_kwargs"]
    if name in ENTRIES and ENTRIES[name].task != "classification":
        raise CheckpointError(f"{source} holds {name}, a model for {ENTRIES[name].task}; a backbone is a classifier")
    return name, arguments


_ADE, _COCO = "4xb4-160k_ade20k-512x512", "mask_rcnn_swin_fpn_coco"
# By family: backbone, suffix, file, parameters, multiply-accumulates / 1e9, and scores: mIoU at one scale and several,
# or AP of boxes and of masks.
_PUBLISHED = {
    "upernet": [
        ("vmamba_tiny_s1l8", "", f"upernet_vssm_{_ADE}_tiny_s_iter_160000.pth", 61_902_572, 949, 47.9, 48.8),
        ("vmamba_tiny_s2l5", "", f"upernet_vssm_{_ADE}_tiny_iter_160000.pth", 62_359_340, 948, 48.3, 48.6),
        ("vmamba_small_s2l15", "", f"upernet_vssm_{_ADE}_small_iter_144000.pth", 81_801_260, 1028, 50.6, 51.2),
        ("vmamba_base_s2l15", "", f"upernet_vssm_{_ADE}_base_iter_160000.pth", 122_069_292, 1170, 51.0, 51.6),
        ("vanilla_vmamba_tiny", "", f"vssmtiny_upernet_{_ADE}_iter_160000.pth", 54_546_956, 964, 47.3, 48.3),
        ("vanilla_vmamba_small", "", f"vssmsmall_upernet_{_ADE}_iter_160000.pth", 76_070_924, 1081, 49.5, 50.5),
        ("vanilla_vmamba_base", "", f"vssmbase_upernet_{_ADE}_iter_128000.pth", 109_765_548, 1226, 50.0, 51.3),
    ],
    "maskrcnn": [
        ("vmamba_tiny_s1l8", "", "mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth", 49_755_312, 271, 47.3, 42.7),
        ("vmamba_tiny_s1l8", "_3x", "mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31.pth", 49_755_312, 271, 48.8, 43.7),
        ("vmamba_tiny_s2l5", "", "mask_rcnn_vssm_fpn_coco_tiny_epoch_12.pth", 50_212_080, 270, 47.4, 42.7),
        ("vmamba_tiny_s2l5", "_3x", "mask_rcnn_vssm_fpn_coco_tiny_ms_3x_epoch_36.pth", 50_212_080, 270, 48.9, 43.7),
        ("vmamba_small_s2l15", "", "mask_rcnn_vssm_fpn_coco_small_epoch_11.pth", 69_654_000, 384, 48.7, 43.7),
        ("vmamba_small_s2l15", "_3x", "mask_rcnn_vssm_fpn_coco_small_ms_3x_epoch_32.pth", 69_654_000, 384, 49.9, 44.2),
        ("vmamba_base_s2l15", "", "mask_rcnn_vssm_fpn_coco_base_epoch_11.pth", 107_931_376, 485, 49.2, 44.1),
        ("vmamba_base_s2l15", "_bs8", "mask_rcnn_vssm_fpn_coco_base_epoch_12_bs8.pth", 107_931_376, 485, 49.2, 43.9),
        ("vanilla_vmamba_tiny", "", f"vssmtiny_{_COCO}_epoch_12.pth", 42_399_696, 286, 46.5, 42.1),
        ("vanilla_vmamba_tiny", "_3x", f"vssmtiny_{_COCO}_ms_3x_epoch_34.pth", 42_399_696, 286, 48.5, 43.2),
        ("vanilla_vmamba_small", "", f"vssmsmall_{_COCO}_epoch_12.pth", 63_923_664, 400, 48.2, 43.0),
        ("vanilla_vmamba_small", "_3x", f"vssmsmall_{_COCO}_ms_3x_epoch_34.pth", 63_923_664, 400, 49.7, 44.0),
        ("vanilla_vmamba_base", "", f"vssmbase_{_COCO}_epoch_12.pth", 95_627_632, 540, 48.6, 43.3),
    ],
}  # fmt: skip
_SCORES = {"upernet": ("mIoU", "mIoU multi-scale"), "maskrcnn": ("box AP", "mask AP")}


def _register(family: str, backbone: str, suffix: str | None = "", **published: Any) -> None:
    network, size, _ = _FAMILIES[family]
    name = family if suffix is None else f"{family}_{backbone}{suffix}"
    build = functools.partial(create, name, family, backbone=backbone)
    register(Entry(name, network.task, build, size, backbone, **published))


for _family, _rows in _PUBLISHED.items():
    for _backbone, _suffix, _file, _params, _flops, *_values in _rows:
        _tag = f"#v{0 if _backbone.startswith('vanilla') else 2}{_FAMILIES[_family][0].task[:3]}"
        _register(
            _family, _backbone, _suffix, url=release_url(_tag, _file), params=_params, flops=_flops,
            published=dict(zip(_SCORES[_family], _values, strict=True)),
        )  # fmt: skip
    for _backbone in VARIANTS:
        if _backbone not in {_row[0] for _row in _rows}:
            _register(_family, _backbone)
    _register(_family, "vmamba_tiny_s1l8", None)  # on any backbone, chosen by `backbone=`
