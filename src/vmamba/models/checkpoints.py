"""Checkpoints: tell what a weight file holds, load it strictly, save a model so that it can be rebuilt."""

from __future__ import annotations

import functools
import inspect
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vmamba.errors import CheckpointError
from vmamba.files import replacing
from vmamba.models.download import download
from vmamba.models.released_names import to_our_names, without_wrappers
from vmamba.models.variants import VARIANTS
from vmamba.models.weight_files import (
    StrPath,
    check_sums,
    read_weight_file,
)

__all__ = [
    "CheckpointInfo",
    "download",
    "identify_checkpoint",
    "load_checkpoint",
    "load_model",
    "read_metadata",
    "save_checkpoint",
]

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

METADATA_FORMAT = 1  # of the files that save_checkpoint writes; raised when an old reader would misread a new file
_FIRST_CONV = ("stem.conv1.weight", "stem.conv.weight")
_HEAD = "head.fc."
_NETWORK = re.compile(r"^((?:.*?\.)?)(?:stem|patch_embed)\.")  # what precedes the stem is how the network was wrapped
_EMA = re.compile(r"(?:^|[._])ema[._]")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a weight file holds, told from its names and shapes.

    Attributes:
        path: the file.
        format: "vmamba" (written by `save_checkpoint`), "safetensors", "released" (a dictionary with the weights under
            "model"), "lightning" (a training checkpoint), "mmsegmentation", "mmdetection", "openmmlab" (a backbone with
            neither head beside it) or "state_dict".
        variant: the name for `vmamba.create_model`, or None when the layout is that of no known variant.
        num_classes: outputs of the classifier, or None when there is none.
        in_chans: channels of the images, or None when the first convolution is missing.
        weights: the sets of weights inside: "model", "ema" or both.
        metadata: numbers and texts stored beside the weights: epoch, config, class names and the like.
    """

    path: Path
    format: str
    variant: str | None
    num_classes: int | None
    in_chans: int | None
    weights: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def backbone_only(self) -> bool:
        """Whether the classifier is missing, as it is in segmentation and detection files."""
        return self.num_classes is None


def identify_checkpoint(path: StrPath) -> CheckpointInfo:
    """Tell which variant a weight file is of, how many classes it has and which weights are inside.

    Raises:
        CheckpointError: the file cannot be read, asks to run code, or holds no VMamba.
    """
    return _open(path)[0]


def load_checkpoint(
    model: nn.Module, path: StrPath, ema: bool = False, reset_head: bool = False, adapt_input: bool = False
) -> CheckpointInfo:
    """Load a weight file into a model, all of it or nothing.

    Reads the released files (old and new names), mmseg and mmdet files, safetensors, training checkpoints of this
    package and plain state dicts. Weights of any floating-point dtype are converted to the model's.

    Args:
        model: a VMamba, or a module that wraps one: compiled, in DistributedDataParallel, a timm feature extractor.
        path: the file.
        ema: whether to load the moving average of the weights instead of the weights.
        reset_head: whether to leave the file's classifier out and draw a new one. A file that holds a backbone only
            has no final norm either; it then starts anew as well.
        adapt_input: whether to sum or repeat the first convolution's weights, as timm does, when the file is for
            images of another number of channels.

    Returns:
        What the file holds.

    Raises:
        CheckpointError: the file cannot be read, asks to run code, or does not fit: a missing, unexpected or misshapen
            tensor, another number of classes or channels. The model is then as it was.
    """
    info, sets = _open(path)
    wanted = "ema" if ema else "model"
    if wanted not in sets:
        raise CheckpointError(f"{path} holds no {wanted} weights, only {info.weights[0]}: pass ema={not ema}.")
    check_sums(info.path)
    given, targets = sets[wanted], _network(model)
    if any(target.is_meta for target in targets.values()):
        raise CheckpointError(f"cannot load {path} into a model on the meta device: call to_empty() on the model first")

    without_classifier = f"{_HEAD}weight" not in targets
    left_out = [_HEAD] if reset_head or without_classifier else []
    if without_classifier and "norm.weight" not in targets:  # a feature extractor
        left_out.append("norm.")
    given = {name: tensor for name, tensor in given.items() if not name.startswith(tuple(left_out))}
    reset = [name for name in targets if reset_head and name not in given and name.startswith((_HEAD, "norm."))]
    if adapt_input:
        for name in set(_FIRST_CONV) & given.keys() & targets.keys():
            given[name] = _adapted(given[name], targets[name].shape[1])
    _check_fit(info, model, given, {name: tensor for name, tensor in targets.items() if name not in reset})

    not_finite = []
    with torch.no_grad():
        for name, tensor in given.items():
            converted = tensor.to(targets[name].dtype)
            if not converted.isfinite().all():
                not_finite.append(name)
            targets[name].copy_(converted)
        for name in reset:
            _reset(name, targets[name])
    if not_finite:
        warnings.warn(f"{path}: NaN or infinity in {_listed(not_finite)}; the model is of no use", stacklevel=2)
    return info


def load_model(path: StrPath) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a model from a file alone.

    Args:
        path: a file written by `save_checkpoint`, or any other with the layout of a known variant.

    Returns:
        The model, in evaluation mode on the CPU, and the metadata of `save_checkpoint`; for other files the variant's
        defaults, without class names.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    from vmamba.models.vmamba import VMamba, create_model

    info, sets = _open(path)
    ours = info.metadata if info.format == "vmamba" else {}
    variant = ours.get("variant") or info.variant
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise CheckpointError(
            f"{path} is of no variant known here ({variant or 'its layout fits none'}). Build the model yourself and"
            f" call vmamba.load_checkpoint(model, path). Known: {', '.join(VARIANTS)}."
        )
    # A file decides nothing but the network's own arguments: not where it lives, nor where else weights come from.
    permitted = inspect.signature(VMamba).parameters.keys() - {"device", "dtype"}
    try:
        options = {name: ours[name] for name in ("img_size",) if name in ours} | dict(ours.get("model_kwargs") or {})
        if not options.keys() <= permitted:
            raise ValueError(f"model_kwargs has {_listed(sorted(options.keys() - permitted))}")
        options |= {"num_classes": info.num_classes or 0, "in_chans": info.in_chans}
        cfg = {name: ours[name] for name in ("mean", "std", "interpolation", "crop_pct") if name in ours}
        build = functools.partial(create_model, variant, pretrained_cfg_overlay=cfg, **options)
        sketch = build(device="meta")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} describes a model that cannot be built: {error}") from error
    kind = info.weights[0]
    _check_fit(info, sketch, sets[kind], _network(sketch))  # before memory is spent on what the file cannot fill
    model = build()
    load_checkpoint(model, path, ema=kind == "ema")
    return model.eval(), {**_default_metadata(model), **ours}


def read_metadata(path: StrPath) -> dict[str, Any]:
    """The metadata that `save_checkpoint` stored in a file.

    Raises:
        CheckpointError: the file cannot be read or was not written by `save_checkpoint`.
    """
    path = Path(path)
    _, header = read_weight_file(path)
    if not header or "vmamba" not in header:
        raise CheckpointError(
            f"{path} was not written by this package and has no metadata of ours; vmamba.identify_checkpoint(path)"
            " tells what can be told from its weights"
        )
    return _parse_metadata(path, header["vmamba"])


def save_checkpoint(model: nn.Module, path: StrPath, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model to a .safetensors file from which `load_model` rebuilds it; a file that exists is replaced at once.

    Args:
        model: a VMamba, or a module that wraps one.
        path: the file; its folder is made if need be.
        metadata: what to store beside the weights, as JSON: "class_names", "mean", "std", "model_kwargs" (arguments of
            `create_model` beyond number of classes and channels), and anything of your own. What the model knows
            (variant, num_classes, in_chans, img_size, ...) is filled in.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**_default_metadata(model), **(metadata or {})}, ensure_ascii=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _network(model).items()}
    with replacing(path) as partial:
        # Not save_file(): that leaves a file which only its owner may read, whatever the umask.
        partial.write_bytes(safetensors.torch.save(tensors, {"format": "pt", "vmamba": text}))


# --- Telling what a file holds ---------------------------------------------------------------------------------------


def _open(path: StrPath) -> tuple[CheckpointInfo, dict[str, State]]:
    """What a file holds, and its sets of weights under our names."""
    path = Path(path)
    contents, header = read_weight_file(path)
    tensors = _tensors(contents)
    networks = _networks(path, tensors)
    prefix, state = networks.get("model") or networks["ema"]
    if header is None:
        kind, metadata = _format(contents, prefix, tensors), _notes(contents)
    elif "vmamba" in header:
        kind, metadata = "vmamba", _parse_metadata(path, header["vmamba"])
    else:
        kind, metadata = "safetensors", dict(header)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    classifier, first_conv = shapes.get(f"{_HEAD}weight"), next((shapes[n] for n in _FIRST_CONV if n in shapes), ())
    info = CheckpointInfo(
        path=path,
        format=kind,
        variant=_variant(shapes, metadata.get("variant")),
        num_classes=classifier[0] if classifier else None,
        in_chans=first_conv[1] if len(first_conv) == 4 else None,
        weights=tuple(kind for kind in ("model", "ema") if kind in networks),
        metadata=metadata,
    )
    return info, {kind: state for kind, (_, state) in networks.items()}


def _format(contents: Mapping[str, Any], prefix: str, tensors: State) -> str:
    """`CheckpointInfo.format` of a file that torch.save wrote."""
    if "pytorch-lightning_version" in contents:
        return "lightning"
    if prefix.endswith("backbone."):
        modules = {part for name in tensors for part in name.split(".")}
        if "decode_head" in modules:
            return "mmsegmentation"
        return "mmdetection" if modules & {"rpn_head", "roi_head", "bbox_head"} else "openmmlab"
    theirs = any(f"{prefix}patch_embed.{first}.weight" in tensors for first in ("0", "proj"))
    return "released" if theirs and isinstance(contents.get("model"), Mapping) else "state_dict"


def _notes(contents: Mapping[str, Any]) -> dict[str, Any]:
    """What a torch file says about itself: its numbers and texts, and the dictionaries customary for that."""
    customary = ("config", "meta", "hyper_parameters")
    return {
        key: _plain(value)
        for key, value in contents.items()
        if isinstance(key, str) and (isinstance(value, str | int | float) or key in customary)
    }


def _plain(value: Any, depth: int = 16) -> Any:
    """Numbers, texts and containers of them; None in place of anything else, and of what is nested without end."""
    if isinstance(value, Mapping) and depth:
        return {str(key): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_plain(item, depth - 1) for item in value]
    return value if isinstance(value, str | int | float) else None


def _tensors(contents: Mapping[str, Any]) -> State:
    """The tensors of a file's dictionary and of the dictionaries directly in it, under their joined names."""
    found: State = {}
    for key, value in contents.items():
        for name, tensor in value.items() if isinstance(value, Mapping) else [("", value)]:
            if isinstance(tensor, Tensor) and isinstance(key, str) and isinstance(name, str):
                found[without_wrappers(f"{key}.{name}" if name else key)] = tensor
    return found


def _networks(path: Path, tensors: State) -> dict[str, tuple[str, State]]:
    """The networks among a file's tensors: "model" and "ema", each with its prefix and its tensors under our names."""
    networks: dict[str, tuple[str, State]] = {}
    for prefix in dict.fromkeys(match[1] for match in map(_NETWORK.match, tensors) if match):
        kind = "ema" if _EMA.search(prefix) else "model"
        if kind in networks:
            raise CheckpointError(
                f"{path} holds several networks, {networks[kind][0]!r} and {prefix!r}; save the one you want on its own"
            )
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for name, tensor in own.items():
            _check_tensor(path, name, tensor)
        try:
            networks[kind] = prefix, to_our_names(own)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    if not networks:
        first = _listed([f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()])
        raise CheckpointError(
            f"{path} holds no VMamba: none of its {len(tensors)} tensors is called stem.* or patch_embed.*"
            + (f", but {first}" if first else "")
        )
    return networks


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Check that a tensor is plain numbers, all of them in the file: a view can claim far more than there is."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name} {tuple(tensor.shape)} is no plain tensor stored in full ({tensor.layout}, {tensor.device})"
        )


@functools.cache
def _layout(variant: str) -> Shapes:
    """Every parameter of a variant and its shape."""
    from vmamba.models.vmamba import create_model

    return {name: tuple(tensor.shape) for name, tensor in create_model(variant, device="meta").state_dict().items()}


def _body(shapes: Shapes) -> Shapes:
    """A layout without what differs among models of one variant: the head, and the channels of the images."""
    body = {name: shape for name, shape in shapes.items() if not name.startswith(("norm.", "head."))}
    return body | {name: (shape[0], *shape[2:]) for name, shape in body.items() if name in _FIRST_CONV and shape}


def _variant(shapes: Shapes, hint: object = None) -> str | None:
    """The variant with this layout, or None. Should several share it, the one hinted at, or else the first."""
    body = _body(shapes)
    names = sorted(VARIANTS, key=lambda name: name != hint)
    return next((name for name in names if _body(_layout(name)) == body), None)


def _parse_metadata(path: Path, text: str) -> dict[str, Any]:
    """The metadata that `_default_metadata` describes, from its text in a file."""
    try:
        metadata = json.loads(text)
        written = metadata["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error}). Fetch the file again.") from error
    if written != METADATA_FORMAT:
        raise CheckpointError(
            f"{path} has metadata of format {written}, this version of vmamba reads {METADATA_FORMAT}: upgrade vmamba"
        )
    return metadata


def _default_metadata(model: nn.Module) -> dict[str, Any]:
    """What a model knows about itself, as stored by `save_checkpoint`."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    known: dict[str, Any] = {
        "variant": getattr(model, "variant", None),
        "num_classes": getattr(model, "num_classes", None),
        "in_chans": getattr(model, "in_chans", None),
        "img_size": getattr(model, "img_size", None),
        "model_kwargs": {},
        **{name: cfg.get(name) for name in ("mean", "std", "interpolation", "crop_pct")},
    }
    return {"format": METADATA_FORMAT, **{name: value for name, value in known.items() if value is not None}}


# --- Fitting a file to a model ---------------------------------------------------------------------------------------


def _network(model: nn.Module) -> State:
    """A model's tensors under the names they have in a bare VMamba, whatever wraps it."""
    state = {without_wrappers(name): tensor for name, tensor in model.state_dict().items()}
    prefix = next((match[1] for match in map(_NETWORK.match, state) if match), "")
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _check_fit(info: CheckpointInfo, model: nn.Module, given: State, targets: State) -> None:
    """Raise one error that says all that keeps a file's weights out of a model."""
    path = str(info.path)
    missing = [f"{name} {tuple(target.shape)}" for name, target in targets.items() if name not in given]
    unexpected = [f"{name} {tuple(tensor.shape)}" for name, tensor in given.items() if name not in targets]
    misshapen = {
        name: f"{name} {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(targets[name].shape)}"
        for name, tensor in given.items()
        if name in targets and (tensor.shape != targets[name].shape or not tensor.is_floating_point())
    }
    if not (missing or unexpected or misshapen):
        return

    counts = f"{len(missing)} tensors missing, {len(unexpected)} unexpected, {len(misshapen)} of another shape"
    lines = [f"{path} does not fit {getattr(model, 'variant', None) or type(model).__name__}: {counts}"]
    own = _variant({name: tuple(target.shape) for name, target in targets.items()})
    if info.variant and info.variant != own:
        lines.append(
            f"The file is of another variant, {info.variant}: create that one, for instance with"
            f" vmamba.create_model({info.variant!r}, checkpoint={path!r}, num_classes={info.num_classes or 0})."
        )
    elif info.backbone_only:
        lines.append(
            "The file holds a backbone without classifier: pass reset_head=True to start with a new one, or create the"
            " model with features_only=True."
        )
    elif f"{_HEAD}weight" in misshapen:
        lines.append(
            f"The file is for {info.num_classes} classes, the model for {len(targets[f'{_HEAD}weight'])}: create the"
            f" model with num_classes={info.num_classes}, or pass reset_head=True to leave the file's classifier out."
        )
    if misshapen.keys() & set(_FIRST_CONV) and info.variant == own:
        lines.append(
            f"The file is for images of {info.in_chans} channels: create the model with in_chans={info.in_chans}, or"
            " pass adapt_input=True to adapt the first convolution's weights."
        )
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen.values())):
        if names:
            lines.append(f"  {title}: {_listed(names)}")
    raise CheckpointError("\n".join(lines))


def _listed(names: Iterable[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return "; ".join(names[:shown]) + (f"; and {len(names) - shown} more" if len(names) > shown else "")


def _adapted(weight: Tensor, channels: int) -> Tensor:
    """The first convolution's weights for images of another number of channels; what cannot be adapted stays."""
    if weight.ndim != 4 or weight.numel() == 0:
        return weight
    return adapt_input_conv(channels, weight, base_chans=weight.shape[1])


def _reset(name: str, target: Tensor) -> None:
    """Draw a parameter of the head or the final norm anew, as a new model does."""
    if name.endswith("bias"):
        nn.init.zeros_(target)
    elif name.startswith(_HEAD):
        nn.init.trunc_normal_(target, std=0.02)
    else:
        nn.init.ones_(target)
