"""Models by name: ours and timm's registries, and models rebuilt from a file alone.

A family joins by `register`, called when its module is imported; `vmamba.models` imports every such module. For
instance, much as dense.py does:

    for backbone, release in RELEASES.items():
        build = functools.partial(_build, backbone)
        register(Entry(f"upernet_{backbone}", "segmentation", build, (512, 2048), backbone, release.url,
                       params=release.params, flops=release.flops, published={"mIoU": release.miou}))

The builder takes `num_classes`, `in_chans`, `img_size`, `pretrained_cfg_overlay` and whatever else `create_model` is
given, and makes the model without weights. The model has the attributes `task`, `variant` (its name), `num_classes`,
`in_chans`, `img_size` and `pretrained_cfg`: a dictionary with timm's keys "mean", "std" and, above all, "classifier"
and "first_conv", the layers that another number of classes or channels replaces. Its VMamba and its heads lie side by
side. When a file is loaded, the backbone's tensors get the model's names for them; those beside it keep the names that
mmsegmentation and mmdetection give them ("decode_head.…", "backbone.outnorm0.…"), unless the class has a method
`from_released`, which is given them all in one dictionary and returns it with other names.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from vmamba.errors import CheckpointError
from vmamba.models.checkpoints import INPUT_KEYS, Checkpoint, default_metadata
from vmamba.models.download import download
from vmamba.models.folders import ModelFolder, is_source, source_of
from vmamba.models.limits import at_most, check_arguments, check_metadata
from vmamba.models.variants import VARIANTS, Variant
from vmamba.models.vmamba import VMamba
from vmamba.models.weight_files import MAX_TENSORS, read_weight_file

Builder = Callable[..., nn.Module]


@dataclass(frozen=True)
class Entry:
    """What is known of a model before it is built.

    Attributes:
        name: what `create_model` calls it.
        task: "classification", "segmentation" or "detection".
        build: makes the model without weights from `create_model`'s keyword arguments.
        img_size: height and width it is meant for.
        backbone: the variant in it; for a classifier, its own name.
        url: where its published weights are, if any.
        params, flops: as published: number of parameters, and multiply-accumulates in units of 1e9 at `img_size`.
        published: scores by name, in percent.
    """

    name: str
    task: str
    build: Builder
    img_size: tuple[int, int]
    backbone: str
    url: str | None = None
    params: int | None = None
    flops: float | None = None
    published: Mapping[str, float] = field(default_factory=dict)


ENTRIES: dict[str, Entry] = {}


def register(entry: Entry) -> None:
    """Make a model known to `create_model`, `list_models` and `load_model`."""
    ENTRIES[entry.name] = entry


def list_models(task: str = "classification") -> list[str]:
    """Names of the models for a task: "classification", "segmentation" or "detection"; published ones first."""
    known = {entry.task for entry in ENTRIES.values()}
    if task not in known:
        raise ValueError(f"there is no task {task!r}; expected one of {', '.join(sorted(known))}")
    return [name for name, entry in ENTRIES.items() if entry.task == task]


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    num_classes: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a model, with random, published or your own weights.

    Args:
        name: one of `list_models(task)`; or "local-dir:FOLDER" or "hf-hub:OWNER/NAME" (or "…@REVISION") for what
            `vmamba.models.hub` or timm saved there, a model of any task, ours or timm's.
        pretrained: whether to download the published weights (once; they are kept in torch's cache), or to take those
            of the folder. With another number of classes, the head is new; with other channels, the first convolution
            is adapted.
        checkpoint: a file to load instead, of any kind that `load_checkpoint` reads; strictly, so a file for another
            number of classes is refused (call `load_checkpoint(..., reset_head=True)` for a new head).
        num_classes: outputs of the classifier; 0 for none, None for as many as were published.
        **kwargs: timm's (`features_only`, `out_indices`, `in_chans`, `img_size`, `global_pool`, `drop_rate`,
            `drop_path_rate`, ...) and the network's, `VMamba`'s for instance.

    Returns:
        The model, in training mode on the CPU, or with `features_only` timm's feature extractor around it. Stochastic
        depth has the rate of the published recipe unless `drop_path_rate` says otherwise.

    Raises:
        ValueError: no model has that name, or both weights and checkpoint are asked for.
        CheckpointError: published weights are asked for, and the model has none; the file does not fit, see
            `load_checkpoint`; or the folder holds no model that is known here.
    """
    if pretrained and checkpoint is not None:
        raise ValueError("pretrained=True and checkpoint= are both given; choose one source of weights")
    kwargs |= {} if num_classes is None else {"num_classes": num_classes}
    if is_source(name):
        model = _from_folder(ModelFolder(name, kwargs.pop("cache_dir", None)), pretrained, kwargs)
    elif name not in ENTRIES:
        alike = difflib.get_close_matches(name, ENTRIES, n=5) or VARIANTS
        raise ValueError(f"there is no model {name!r}; expected one such as {', '.join(alike)}: see `vmamba models`")
    elif (entry := ENTRIES[name]).task == "classification":
        if checkpoint is not None and kwargs.get("features_only"):
            kwargs["pretrained_cfg_overlay"] = {**kwargs.get("pretrained_cfg_overlay", {}), "file": str(checkpoint)}
            pretrained, checkpoint = True, None
        model = entry.build(pretrained=pretrained, **kwargs)
    else:
        model = entry.build(**kwargs)
        if pretrained:
            _load_published(model, _published(name, entry.url))
    if checkpoint is not None:
        Checkpoint(checkpoint).load(model)
    return model


def load_model(path: str | PathLike[str], ema: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a model from a file alone.

    Args:
        path: a file written by `save_checkpoint`, a training checkpoint of this package, or any other file with the
            layout of a known variant; or a folder, "local-dir:FOLDER" or "hf-hub:OWNER/NAME", see `create_model`.
        ema: of a file that holds both, whether to take the averaged weights.

    Returns:
        The model, in evaluation mode on the CPU, and the metadata of `save_checkpoint`; for other files the variant's
        defaults, without class names.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    if source := source_of(path):
        folder = ModelFolder(source)
        path = folder.weights()
        if "vmamba" not in (read_weight_file(path).header or {}):  # not written here: only config.json tells the model
            model = _from_folder(folder, True, {}).eval()
            return model, {**default_metadata(model), **folder.metadata()}
    checkpoint = Checkpoint(path)
    info, stored = checkpoint.info, checkpoint.told
    same = (e.name for e in ENTRIES.values() if (e.task, e.backbone) == (info.task, info.variant))
    name = stored.get("variant") or next(same, info.variant)
    if not isinstance(name, str) or not (name in ENTRIES or timm.is_model(name)):
        raise CheckpointError(
            f"{path} is of no variant known here ({name or 'its layout fits none'}). Build the model yourself and"
            f" call vmamba.load_checkpoint(model, path). Known: {', '.join(ENTRIES)}."
        )
    task = ENTRIES[name].task if name in ENTRIES else "classification"
    if info.task != task and info.task in {entry.task for entry in ENTRIES.values()}:  # others are the user's own
        raise CheckpointError(f"{path} says that it is for {info.task!r}, but {name} is for {task}")
    try:
        build = functools.partial(create_model if name in ENTRIES else timm.create_model, name)
        build = functools.partial(build, **_options(checkpoint, stored, ours=name in ENTRIES))
        with at_most(len(checkpoint.tensors)), torch.device("meta"):
            sketch = build()
    except Exception as error:  # the arguments come from the file, and may fail anywhere
        raise CheckpointError(f"{path} describes a model that cannot be built: {error}") from error
    ema = ema or "model" not in info.weights
    checkpoint.check(sketch, ema)  # before memory is spent on what the file cannot fill
    model = build()
    checkpoint.load(model, ema)
    return model.eval(), {**default_metadata(model), **stored}


def open_model(source: str | PathLike[str], pretrained: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """The model of one of `list_models()`, with its published weights, or what `load_model` makes of a file or folder.

    Args:
        source: a name, a file, or a folder.
        pretrained: whether the weights of a name are the published ones, not random.

    Returns:
        The model, in evaluation mode on the CPU, and what is known of it beside what it knows itself.

    Raises:
        CheckpointError: there are no published weights; or see `load_checkpoint`.
    """
    if (name := fspath(source)) in ENTRIES:
        return create_model(name, pretrained=pretrained).eval(), {}
    return load_model(source)


def _options(checkpoint: Checkpoint, stored: Mapping[str, Any], ours: bool) -> dict[str, Any]:
    """The arguments with which a file's model is built, as its metadata and its tensors have them.

    Raises:
        ValueError: they ask for more than a network: where it lives, other weights, sizes beyond reason.
    """
    check_metadata(stored)
    options, overlay, info = dict(stored.get("model_kwargs") or {}), _statistics(stored), checkpoint.info
    size = stored.get("sides") or stored.get("img_size")  # a trained detector's own, not its variant's
    if size and ours:
        options = {"img_size": size} | options
    elif size:  # not every other network of timm's takes it as an argument; to those that must have it, timm gives it
        overlay["input_size"] = (info.in_chans, *to_2tuple(size))
    check_arguments(options)
    classes = 0 if info.num_classes is None and info.task == "classification" else info.num_classes
    return options | {"num_classes": classes, "in_chans": info.in_chans, "pretrained_cfg_overlay": overlay}


def _statistics(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {name: stored[name] for name in INPUT_KEYS if name in stored}


def _from_folder(folder: ModelFolder, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """The model of a folder, ours or timm's, built with `kwargs` where they say something else than its configuration.

    Raises:
        CheckpointError: the configuration describes no model that is known here, or the weights do not fit it.
    """
    name, stored = folder.architecture, folder.metadata()
    if name not in ENTRIES and not timm.is_model(name):
        raise CheckpointError(
            f"{folder.name} holds a model called {name!r}, which neither this package nor timm knows: a newer version"
            " may, or a package of its author's that has to be imported first"
        )
    checkpoint = Checkpoint(folder.weights()) if pretrained else None
    is_dense = name in ENTRIES and ENTRIES[name].task != "classification"
    try:
        check_metadata(stored)
        check_arguments(folder.config.get("model_args") or {})
        if is_dense:
            build = functools.partial(ENTRIES[name].build, pretrained_cfg_overlay=_statistics(stored))
            options = {key: stored[key] for key in ("num_classes", "in_chans", "img_size") if key in stored}
            options = stored["model_kwargs"] | options
        else:  # timm reads the configuration once more, for all that it knows of it
            build, options = functools.partial(timm.create_model, f"local-dir:{folder.path}"), {}
        with at_most(len(checkpoint.tensors) if checkpoint else MAX_TENSORS), torch.device("meta"):
            sketch = build(**options)
    except Exception as error:  # the arguments come from the folder, and may fail anywhere
        raise CheckpointError(f"{folder.name} describes a model that cannot be built: {error}") from error
    if checkpoint is None:
        return build(**options | kwargs)
    # Before memory is spent on what the file cannot fill. What timm does to its own models' files only timm knows.
    if name in ENTRIES:
        checkpoint.check(sketch)
    elif sum(p.numel() for p in sketch.parameters()) > 2 * sum(t.numel() for t in checkpoint.tensors.values()) + 1024:
        raise CheckpointError(f"{checkpoint.path} holds far fewer numbers than {name} has")
    if is_dense:
        model = build(**options | kwargs)
        checkpoint.load(model, reset_head=None, adapt_input=True)
        return model
    # Where the weights are is not the configuration's to say, nor how they are read.
    where = dict.fromkeys(("source", "file", "url", "hf_hub_id", "hf_hub_filename", "state_dict")) | {
        "custom_load": False,
        **({"file": str(checkpoint.path)} if name in ENTRIES else {"state_dict": checkpoint.tensors}),
    }
    overlay = {**(kwargs.pop("pretrained_cfg_overlay", None) or {}), **where}
    try:
        model = build(pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    except CheckpointError:
        raise
    except RuntimeError as error:  # torch's, that tensors are missing or of another shape
        raise CheckpointError(f"{checkpoint.path} does not fit {name}: {error}") from error
    configuration: Any = model.pretrained_cfg
    configuration.pop("state_dict", None)
    return model


def _published(name: str, url: str | None) -> str:
    """The file with a model's published weights."""
    if not url:
        raise CheckpointError(
            f"{name} has no published weights: give a file of trained ones (in Python as checkpoint=PATH), or take"
            " random ones (pretrained=False)"
        )
    return str(download(url))


def _load_published(model: nn.Module, file: str) -> None:
    """Load a published file into a model that may have other classes and channels."""
    Checkpoint(file).load(model, reset_head=None, adapt_input=True)


# --- The classifiers, in timm's registry -----------------------------------------------------------------------------


def _default_cfg(variant: Variant) -> dict[str, Any]:
    height, width = variant.img_size
    total_stride = variant.stem_stride * 2 ** (len(variant.dims) - 1)
    return {
        "url": variant.release.url if variant.release else "",
        "num_classes": 1000,
        "input_size": (3, height, width),
        "min_input_size": (3, total_stride, total_stride),
        "pool_size": (-(-height // total_stride), -(-width // total_stride)),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv" if variant.stem == "patch" else "stem.conv1",
        "classifier": "head.fc",
        "license": "mit",
        "paper_name": "VMamba: Visual State Space Model",
        "paper_ids": "arXiv:2401.10166",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k" if variant.release else name: _default_cfg(variant) for name, variant in VARIANTS.items()}
)


def _build(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a variant as timm's `create_model` asks for it."""
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    # What timm saved itself, or a state dict, timm loads itself.
    by_timm = pretrained and bool(cfg.source or cfg.hf_hub_id or cfg.state_dict)
    file = cfg.file or _published(name, str(cfg.url or "")) if pretrained and not by_timm else None
    arguments = VARIANTS[name].arguments()

    def make(**options: Any) -> VMamba:
        model = VMamba(**{**arguments, **options})
        model.variant = name
        if file:  # now: a feature extractor keeps only a part of the model
            _load_published(model, file)
        return model

    stages = tuple(range(len(arguments["dims"])))
    feature_cfg = {"out_indices": stages, "feature_cls": "getter", "flatten_sequential": True}
    return build_model_with_cfg(make, name, by_timm, feature_cfg=feature_cfg, **kwargs)


def _entrypoint(name: str) -> Builder:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"VMamba variant {name}; see `vmamba.models.variants.VARIANTS`."
    return create


for _name, _variant in VARIANTS.items():
    register_model(_entrypoint(_name))
    _release = _variant.release
    _numbers: dict[str, Any] = {}
    if _release:
        _numbers = {"url": _release.url, "params": _release.params, "flops": _release.flops}
        _numbers["published"] = {"top1": _release.top1}
    register(
        Entry(
            _name, "classification", functools.partial(timm.create_model, _name), _variant.img_size, _name, **_numbers
        )
    )
__all__ = [  # timm added its entrypoints
    "ENTRIES", "Entry", "create_model", "list_models", "load_model", "open_model", "register",
]  # fmt: skip
