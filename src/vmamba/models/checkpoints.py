"""Checkpoints: tell what a weight file holds, load it strictly, save a model so that it can be rebuilt."""

from __future__ import annotations

import functools
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import adapt_input_conv, get_model_args, get_model_input_config
from torch import Tensor, nn

from vmamba.errors import CheckpointError, listed
from vmamba.files import replacing
from vmamba.models.changes import changed_parts
from vmamba.models.limits import at_most, check_arguments, check_metadata
from vmamba.models.released_names import to_our_names, without_wrappers
from vmamba.models.variants import VARIANTS
from vmamba.models.vmamba import VMamba
from vmamba.models.weight_files import (
    StrPath,
    check_sums,
    read_weight_file,
)
from vmamba.nn import SS2D
from vmamba.ops import PATTERNS

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "identify_checkpoint",
    "load_checkpoint",
    "read_metadata",
    "save_checkpoint",
]

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

INPUT_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # how images become inputs, beside their size
METADATA_FORMAT = 1  # of the files that save_checkpoint writes; raised when an old reader would misread a new file
_FIRST_CONV = ("stem.conv1.", "stem.conv.")
_HEAD = ("head.fc.",)
_NETWORK = re.compile(r"^((?:.*?\.)?)(?:stem|patch_embed)\.")  # what precedes the stem is how the network was wrapped
_EMA = re.compile(r"(?:^|[._])ema[._]")
_DENSE_HEADS = {
    "decode_head": "segmentation",
    "rpn_head": "detection",
    "roi_head": "detection",
    "bbox_head": "detection",
}
# Their classifiers, and how many of the rows are no class: detectors have one for the background.
_DENSE_CLASSIFIERS = {"decode_head.conv_seg.weight": 0, "roi_head.bbox_head.fc_cls.weight": 1}


@dataclass(frozen=True)
class CheckpointInfo:
    """What a weight file holds, told from its names and shapes.

    Attributes:
        path: the file.
        format: "vmamba" (written by `save_checkpoint`), "safetensors", "released" (a dictionary with the weights under
            "model"), "lightning" (a training checkpoint), "mmsegmentation", "mmdetection", "openmmlab" (a backbone with
            neither head beside it) or "state_dict".
        variant: the name for `vmamba.create_model`, or None when the layout is that of no known variant. Of a network
            built on a VMamba, the backbone's; in a file that `save_checkpoint` made of another of timm's models, the
            name for `timm.create_model`.
        num_classes: outputs of the classifier, or None when there is none.
        in_chans: channels of the images, or None when the first convolution is missing.
        weights: the sets of weights inside: "model", "ema" or both.
        metadata: numbers and texts stored beside the weights: epoch, config, class names and the like.
        task: "classification", "segmentation" or "detection".
    """

    path: Path
    format: str
    variant: str | None
    num_classes: int | None
    in_chans: int | None
    weights: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)
    task: str = "classification"

    @property
    def backbone_only(self) -> bool:
        """Whether the classifier is missing, as it is in segmentation and detection files."""
        return self.num_classes is None or self.task != "classification"


def identify_checkpoint(path: StrPath) -> CheckpointInfo:
    """Tell which variant a weight file is of, how many classes it has and which weights are inside.

    Raises:
        CheckpointError: the file cannot be read, asks to run code, or holds no VMamba.
    """
    return Checkpoint(path).info


def load_checkpoint(
    model: nn.Module, path: StrPath, ema: bool = False, reset_head: bool = False, adapt_input: bool = False
) -> CheckpointInfo:
    """Load a weight file into a model, all of it or nothing.

    Reads the released files (old and new names), mmseg and mmdet files, safetensors, training checkpoints of this
    package and plain state dicts. Weights of any floating-point dtype are converted to the model's.

    Args:
        model: a VMamba, a model built on one, another of timm's, or a module that wraps one of these: compiled, in
            DistributedDataParallel, a timm feature extractor.
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
    return Checkpoint(path).load(model, ema, reset_head, adapt_input)


def read_metadata(path: StrPath) -> dict[str, Any]:
    """The metadata that `save_checkpoint` stored in a file.

    Raises:
        CheckpointError: the file cannot be read or was not written by `save_checkpoint`.
    """
    path = Path(path)
    header = read_weight_file(path).header
    if not header or "vmamba" not in header:
        raise CheckpointError(
            f"{path} was not written by this package and has no metadata of ours; vmamba.identify_checkpoint(path)"
            " tells what can be told from its weights"
        )
    return _parse_metadata(path, header["vmamba"])


def save_checkpoint(model: nn.Module, path: StrPath, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model to a .safetensors file from which `load_model` rebuilds it; a file that exists is replaced at once.

    Args:
        model: a VMamba, a model built on one, another that `timm.create_model` made, or a module that wraps one.
        path: the file; its folder is made if need be.
        metadata: what to store beside the weights, as JSON: "class_names", "mean", "std", "model_kwargs" (arguments of
            `create_model` beyond number of classes and channels), and anything of your own. What the model knows
            (variant, num_classes, in_chans, img_size, model_kwargs, ...) is filled in.

    Raises:
        TypeError: the metadata holds what JSON cannot, such as a scan pattern that was not registered by a name, or
            class_names is one text, not a list.

    Warns:
        UserWarning: parts of the model have been changed, which `load_model` would not know.
    """
    if isinstance(names := (metadata or {}).get("class_names"), str):
        raise TypeError(f"class_names is {names!r}; expected a list of names")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = metadata_text(model, metadata)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _network(model).items()}
    with replacing(path) as partial:
        # Not save_file(): that leaves a file which only its owner may read, whatever the umask.
        partial.write_bytes(safetensors.torch.save(tensors, {"format": "pt", "vmamba": text}))
    told = json.loads(text)
    if changes := _untold(model, told):
        warnings.warn(
            f"{path} tells how {told['variant']} is built, and not what has been changed since: {listed(changes, 3)}."
            " load_model() makes of it a network that computes something else: build yours, and give it the weights by"
            " vmamba.load_checkpoint(model, path)",
            stacklevel=2,
        )


def _untold(model: nn.Module, told: Mapping[str, Any]) -> list[str]:
    """What differs, and no tensor shows it, between a classifier and the one that is built by its metadata."""
    name, options = told.get("variant"), told.get("model_kwargs") or {}
    if not isinstance(name, str) or not timm.is_model(name):
        return []
    tensors = len(model.state_dict())
    try:
        check_metadata(told)
        check_arguments(options)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("meta"), at_most(tensors):
            warnings.simplefilter("ignore")
            given = {key: told[key] for key in ("num_classes", "in_chans") if key in told}
            built = timm.create_model(name, **{**options, **given})
    except Exception:  # whatever keeps it from being built is said where somebody builds it
        return []
    shapes = [{key: tensor.shape for key, tensor in _network(each).items()} for each in (_unwrapped(model), built)]
    return changed_parts(_unwrapped(model), built) if shapes[0] == shapes[1] else []


def metadata_text(model: nn.Module, metadata: Mapping[str, Any] | None = None) -> str:
    """The JSON that `save_checkpoint` stores; a torch file has it under "vmamba"."""
    return json.dumps({**default_metadata(model), **(metadata or {})}, ensure_ascii=False, default=named_pattern)


def default_metadata(model: nn.Module) -> dict[str, Any]:
    """What a model, or the one that a module wraps, knows about itself, as stored by `save_checkpoint`."""
    model = _unwrapped(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    own = {name: getattr(model, name, None) for name in ("num_classes", "in_chans")} | {"img_size": _size(model)}
    arguments = get_model_args(model) if hasattr(model, "_model_args") else {}
    backbone = _backbone(model)
    if backbone is not None and (backbone.pattern != "cross" or "pattern" in arguments):
        arguments["pattern"] = backbone.pattern  # which may have been set since it was built
    # `load_model` gives ours their size. Others of timm's have it among their arguments if they take it at all.
    kept = {"img_size"} if backbone is None else set()
    known: dict[str, Any] = {
        "variant": getattr(model, "variant", cfg.get("architecture")),
        "task": getattr(model, "task", None),
        "class_names": getattr(model, "class_names", None),
        **own,
        "model_kwargs": {name: value for name, value in arguments.items() if own.get(name) is None or name in kept},
        **{name: cfg.get(name) for name in INPUT_KEYS},
    }
    known |= {name: per_channel(known[name], own["in_chans"]) for name in ("mean", "std")}
    return {"format": METADATA_FORMAT, **{name: value for name, value in known.items() if value is not None}}


def _size(model: nn.Module) -> Any:
    """The height and width that a model is meant for, as it says itself or as timm's configuration of it does."""
    configured = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    return getattr(model, "img_size", None) or (configured and get_model_input_config(model)["input_size"][1:])


def per_channel(values: Any, channels: int | None) -> Any:
    """Means or standard deviations of a network's input: those of RGB become one where the network takes grey alone."""
    return (sum(values) / 3,) if channels == 1 and values is not None and len(values) == 3 else values


def _backbone(model: nn.Module) -> VMamba | None:
    return next((module for module in model.modules() if isinstance(module, VMamba)), None)


def _registered(value: object) -> object:
    """A scan pattern by the name it is registered by, where it is a function that has one."""
    return next((name for name, pattern in PATTERNS.items() if pattern is value), value)


def named_pattern(value: object) -> object:
    """What a file holds in place of a scan pattern that is a function."""
    if (name := _registered(value)) is value:
        advice = ": register it by a name, vmamba.register_pattern(name, function)" if callable(value) else ""
        raise TypeError(f"the metadata is JSON, which cannot hold {value!r}{advice}")
    return name


class Checkpoint:
    """A weight file, read once.

    Args:
        path: the file.

    Attributes:
        told: what this package stored in it about the network, if it did.
        metadata: all that is stored beside the weights.

    Raises:
        CheckpointError: the file cannot be read or asks to run code.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        file = read_weight_file(self.path)
        header = file.header
        self.tensors = {without_wrappers(name): tensor for name, tensor in file.tensors.items()}
        self.container = "torch" if header is None else "vmamba" if "vmamba" in header else "safetensors"
        beside = dict(file.notes if header is None else header)
        text = beside.pop("vmamba", None)
        self.told = _parse_metadata(self.path, text) if isinstance(text, str) else {}
        self.metadata = self.told if self.container == "vmamba" else beside | self.told

    @functools.cached_property
    def networks(self) -> dict[str, tuple[str, State]]:
        """The VMambas in the file: "model" and "ema", each with its prefix and its tensors under our names."""
        return _networks(self.path, self.tensors)

    @functools.cached_property
    def info(self) -> CheckpointInfo:
        """What the file holds, told from its names and shapes.

        Raises:
            CheckpointError: it holds no VMamba, nor another model of timm's that says which one it is.
        """
        name = self.told.get("variant") if self.container == "vmamba" else None
        is_dense = self.told.get("task") in _DENSE_HEADS.values() and _vmamba_in(self.tensors) is None
        if isinstance(name, str) and name not in VARIANTS and (timm.is_model(name) or is_dense):
            classes, channels = (self.metadata.get(key) for key in ("num_classes", "in_chans"))
            return self._info({"model": ("", self.tensors)}, name, classes or None, channels)
        _, state = next(iter(self.networks.values()))
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        variant = _variant(shapes, self.metadata.get("variant"))
        return self._info(self.networks, variant, *_classes_and_channels(state, _HEAD, _FIRST_CONV))

    def _info(
        self, networks: Mapping[str, tuple[str, State]], variant: str | None, classes: int | None, channels: int | None
    ) -> CheckpointInfo:
        prefix, _ = next(iter(networks.values()))
        kind = _format(self.metadata, prefix, self.tensors) if self.container == "torch" else self.container
        parts = {part for name in self.tensors for part in name.split(".")} & _DENSE_HEADS.keys()
        task = str(self.told.get("task") or next((_DENSE_HEADS[part] for part in parts), "classification"))
        if task != "classification":
            rows = (
                len(tensor) - others
                for name, tensor in self.tensors.items()
                for classifier, others in _DENSE_CLASSIFIERS.items()
                if name.endswith(classifier) and tensor.ndim > 1
            )
            classes = next(rows, self.told.get("num_classes"))
        return CheckpointInfo(
            path=self.path,
            format=kind,
            variant=variant,
            num_classes=classes,
            in_chans=channels,
            weights=tuple(networks),
            metadata=self.metadata,
            task=task,
        )

    def load(
        self, model: nn.Module, ema: bool = False, reset_head: bool | None = False, adapt_input: bool = False
    ) -> CheckpointInfo:
        """`load_checkpoint`; with `reset_head=None` a new head is drawn only where the file's is of another size."""
        info, given, targets = self._fitted_to(model, ema)
        check_sums(self.path)
        if any(target.is_meta for target in targets.values()):
            raise CheckpointError(
                f"cannot load {self.path} into a model on the meta device: call to_empty() on the model first"
            )
        heads = _layers(model, "classifier", _HEAD)
        if reset_head is None:
            reset_head = any(
                name.startswith(heads) and (name not in given or given[name].shape != target.shape)
                for name, target in targets.items()
            )
        if reset_head:
            given = {name: tensor for name, tensor in given.items() if not name.startswith(heads)}
        reset = [n for n in targets if reset_head and n not in given and n.startswith((*heads, "norm."))]
        if adapt_input:
            for name in {f"{conv}weight" for conv in _layers(model, "first_conv", _FIRST_CONV)}:
                if name in given and name in targets:
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
        self._warn_of_another_pattern(model)
        if not_finite:
            warnings.warn(f"{self.path}: NaN or infinity in {listed(not_finite)}; the model is of no use", stacklevel=3)
        return info

    def _warn_of_another_pattern(self, model: nn.Module) -> None:
        """Say so where the weights have learned with another scan pattern, which no shape shows."""
        backbone, arguments = _backbone(model), self.told.get("model_kwargs", {})
        if not self.told or backbone is None or not isinstance(arguments, Mapping):
            return
        learned = arguments.get("pattern", "cross")
        own = [_registered(module.pattern) for module in backbone.modules() if isinstance(module, SS2D)]
        # Of a model without its last blocks, those that it has.
        if own != (list(learned)[: len(own)] if isinstance(learned, list) else [learned] * len(own)):
            warnings.warn(
                f"{self.path} was trained with the scan pattern {learned!r}, but the model has {backbone.pattern!r}: it"
                f" computes something else unless you build it with pattern={learned!r} or train it on",
                stacklevel=4,
            )

    def check(self, model: nn.Module, ema: bool = False) -> None:
        """Check that `load` would succeed, without memory: the model may be on the meta device.

        Raises:
            CheckpointError: see `load_checkpoint`.
        """
        info, given, targets = self._fitted_to(model, ema)
        _check_fit(info, model, given, targets)

    def _fitted_to(self, model: nn.Module, ema: bool) -> tuple[CheckpointInfo, State, State]:
        """What the file is to this kind of model, its tensors under the model's names, and the model's own."""
        targets, kind = _network(model), "ema" if ema else "model"
        heads, convs = _layers(model, "classifier", _HEAD), _layers(model, "first_conv", _FIRST_CONV)
        prefix = _vmamba_in(targets)
        networks = self.networks if prefix is not None else self._matching(targets)
        if kind not in networks:
            raise CheckpointError(
                f"{self.path} holds no {kind} weights, only {next(iter(networks))}: pass ema={not ema}."
            )
        where, given = networks[kind]
        info = self.info if prefix == "" else None
        if prefix:  # a network built on a VMamba
            given = self._with_heads(prefix, where, given)
            if hasattr(_unwrapped(model), "from_released"):
                given = _unwrapped(model).from_released(given)
        if info is None:
            variant = self.info.variant if prefix else self.metadata.get("variant")
            info = self._info(networks, variant, *_classes_and_channels(given, heads, convs))
        if not any(name.startswith(heads) for name in targets):
            left_out = heads if "norm.weight" in targets else (*heads, "norm.")  # a feature extractor has neither
            given = {name: tensor for name, tensor in given.items() if not name.startswith(left_out)}
        return info, given, targets

    def _with_heads(self, inside: str, where: str, backbone: State) -> State:
        """A backbone's tensors under a prefix, and those that lie beside it in the file under their own names."""
        root = where.rpartition("backbone.")[0] if "backbone." in where else where
        state = {inside + name: tensor for name, tensor in backbone.items()}
        for name, tensor in self.tensors.items():
            if name.startswith(root) and (not name.startswith(where) or name.startswith(f"{where}outnorm")):
                state[name.removeprefix(root)] = tensor
        return state

    def _matching(self, targets: State) -> dict[str, tuple[str, State]]:
        """Networks with the names of `targets`: those under the prefix that makes most names agree."""
        depth = max(name.count(".") for name in targets) + 1
        agreeing: Counter[str] = Counter()
        for name in self.tensors:
            parts = name.split(".")
            for tail in (".".join(parts[i:]) for i in range(max(len(parts) - depth, 0), len(parts))):
                if tail in targets:
                    agreeing[name.removesuffix(tail)] += 1
        networks: dict[str, tuple[str, State]] = {}
        for prefix, count in agreeing.most_common():
            kind = "ema" if _EMA.search(prefix) else "model"
            if kind not in networks:
                state = {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}
                networks[kind] = prefix, state
            elif count == agreeing[networks[kind][0]]:
                raise _several(self.path, networks[kind][0], prefix)
        return networks or {"model": ("", self.tensors)}


# --- Telling what a file holds ---------------------------------------------------------------------------------------


def _format(notes: Mapping[str, Any], prefix: str, tensors: State) -> str:
    """`CheckpointInfo.format` of a file that torch.save wrote."""
    if "pytorch-lightning_version" in notes:
        return "lightning"
    if prefix.endswith("backbone."):
        modules = {part for name in tensors for part in name.split(".")}
        if "decode_head" in modules:
            return "mmsegmentation"
        return "mmdetection" if modules & {"rpn_head", "roi_head", "bbox_head"} else "openmmlab"
    theirs = any(f"{prefix}patch_embed.{first}.weight" in tensors for first in ("0", "proj"))
    return "released" if theirs and prefix.startswith("model.") else "state_dict"


def _networks(path: Path, tensors: State) -> dict[str, tuple[str, State]]:
    """The VMambas among a file's tensors: "model" and "ema", each with its prefix and its tensors under our names."""
    networks: dict[str, tuple[str, State]] = {}
    for prefix in dict.fromkeys(match[1] for match in map(_NETWORK.match, tensors) if match):
        kind = "ema" if _EMA.search(prefix) else "model"
        if kind in networks:
            raise _several(path, networks[kind][0], prefix)
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        try:
            networks[kind] = prefix, to_our_names(own)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    if not networks:
        first = listed([f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()])
        raise CheckpointError(
            f"{path} holds no VMamba: none of its {len(tensors)} tensors is called stem.* or patch_embed.*"
            + (f", but {first}" if first else "")
            + ". Weights of another of timm's models are read by vmamba.load_checkpoint(model, path) with that model."
        )
    return dict(sorted(networks.items(), reverse=True))


def _several(path: Path, first: str, second: str) -> CheckpointError:
    return CheckpointError(f"{path} holds several networks, {first!r} and {second!r}; save the one you want on its own")


@functools.cache
def _layout(variant: str) -> Shapes:
    """Every parameter of a variant and its shape."""
    model = VMamba(**VARIANTS[variant].arguments(), device="meta")
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _body(shapes: Shapes) -> Shapes:
    """A layout without what differs among models of one variant: the head, and the channels of the images."""
    body = {name: shape for name, shape in shapes.items() if not name.startswith(("norm.", "head."))}
    convs = [f"{conv}weight" for conv in _FIRST_CONV]
    return body | {name: (body[name][0], *body[name][2:]) for name in convs if body.get(name)}


def _variant(shapes: Shapes, hint: object = None) -> str | None:
    """The variant with this layout, or None. Should several share it, the one hinted at, or else the first."""
    body = _body(shapes)
    names = sorted(VARIANTS, key=lambda name: name != hint)
    return next((name for name in names if _body(_layout(name)) == body), None)


def _classes_and_channels(state: State, heads: Iterable[str], convs: Iterable[str]) -> tuple[int | None, int | None]:
    """Outputs of a network's classifier and channels of its first convolution, None for what it does not have."""
    head, conv = (
        next((state[f"{name}weight"] for name in names if f"{name}weight" in state), None) for names in (heads, convs)
    )
    classes = None if head is None or not head.ndim else len(head)
    channels = None if conv is None or conv.ndim != 4 else conv.shape[1]
    return classes, channels


def _parse_metadata(path: Path, text: str) -> dict[str, Any]:
    """The metadata that `default_metadata` describes, from its text in a file."""
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


# --- Fitting a file to a model ---------------------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> Any:
    """The model in a module that wraps one."""
    while not (isinstance(model, VMamba) or hasattr(model, "pretrained_cfg")) and len([*model.children()]) == 1:
        (model,) = model.children()
    return model


def _layers(model: nn.Module, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    """How the names of a model's layers begin that timm's configuration calls "classifier" or "first_conv"."""
    names = (getattr(_unwrapped(model), "pretrained_cfg", None) or {}).get(key)
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names)) if names else default


def _network(model: nn.Module) -> State:
    """A model's tensors under the names they have without what wraps it."""
    state = {without_wrappers(name): tensor for name, tensor in model.state_dict().items()}
    folders = zip(*(name.split(".")[:-1] for name in state), strict=False)
    shared = "".join(f"{names[0]}." for names in itertools.takewhile(lambda names: len(set(names)) == 1, folders))
    return {name.removeprefix(shared): tensor for name, tensor in state.items()}


def _vmamba_in(names: Iterable[str]) -> str | None:
    """What precedes the names of a VMamba's tensors among those of a model, or None where there is no VMamba."""
    if not any(".ss2d." in name for name in names):
        return None
    return next((match[1] for match in map(_NETWORK.match, names) if match), None)


def _check_fit(info: CheckpointInfo, model: nn.Module, given: State, targets: State) -> None:
    """Raise one error that says all that keeps a file's weights out of a model."""
    path = str(info.path)
    missing = [f"{name} {tuple(target.shape)}" for name, target in targets.items() if name not in given]
    unexpected = [f"{name} {tuple(tensor.shape)}" for name, tensor in given.items() if name not in targets]
    misshapen = {
        name: f"{name} {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(targets[name].shape)}"
        for name, tensor in given.items()
        if name in targets
        and (tensor.shape != targets[name].shape or tensor.is_floating_point() != targets[name].is_floating_point())
    }
    if not (missing or unexpected or misshapen):
        return

    counts = f"{len(missing)} tensors missing, {len(unexpected)} unexpected, {len(misshapen)} of another shape"
    known = default_metadata(model).get("variant")
    lines = [f"{path} does not fit {known or type(model).__name__}: {counts}"]
    inside = _vmamba_in(targets)
    own = known
    if inside is not None:
        own = _variant({n.removeprefix(inside): tuple(t.shape) for n, t in targets.items() if n.startswith(inside)})
    head, *_ = _layers(model, "classifier", _HEAD)
    if info.variant and info.variant not in (own, known):
        lines.append(
            f"The file is of another variant, {info.variant}: create that one, for instance with"
            f" vmamba.create_model({info.variant!r}, checkpoint={path!r}, num_classes={info.num_classes or 0})."
        )
    elif info.backbone_only and not inside:
        lines.append(
            "The file holds a backbone without classifier: pass reset_head=True to start with a new one, or create the"
            " model with features_only=True."
        )
    elif f"{head}weight" in misshapen and info.num_classes != default_metadata(model).get("num_classes"):
        lines.append(
            f"The file is for {info.num_classes} classes, the model for {default_metadata(model).get('num_classes')}:"
            f" create the model with num_classes={info.num_classes}, or pass reset_head=True to leave the file's"
            " classifier out."
        )
    first = {f"{conv}weight" for conv in _layers(model, "first_conv", _FIRST_CONV)}
    if any(_differ_in_channels(given[name], targets[name]) for name in misshapen.keys() & first):
        lines.append(
            f"The file is for images of {info.in_chans} channels: create the model with in_chans={info.in_chans}, or"
            " pass adapt_input=True to adapt the first convolution's weights."
        )
    if inside is not None:
        theirs, ours = (
            _options({name.removeprefix(inside): tuple(tensor.shape) for name, tensor in state.items()})
            for state in (given, targets)
        )
        options = [f"{n}={theirs[n]!r}, not {ours[n]!r}" for n in theirs if n in ours and theirs[n] != ours[n]]
        if options:
            lines.append(f"The file is of a network with {'; '.join(options)}.")
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen.values())):
        if names:
            lines.append(f"  {title}: {listed(names)}")
    raise CheckpointError("\n".join(lines))


def _differ_in_channels(one: Tensor, other: Tensor) -> bool:
    """Whether two weights of a first convolution differ in the channels of the images, and in nothing else."""
    return one.ndim == other.ndim == 4 and one.shape[1] != other.shape[1] and one[:, :1].shape == other[:, :1].shape


def _options(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `VMamba` that the shapes of its tensors tell; those of single blocks as of the first that scans."""
    scan = next((name.removesuffix("A_log") for name in shapes if name.endswith(".ss2d.A_log")), "")
    projection = shapes.get(f"{scan}out_proj.weight", ())
    if len(projection) != 2 or 0 in projection or not shapes[f"{scan}A_log"]:
        return {}
    dim, inner = projection

    def first(*names: str) -> int:
        return next((shapes[name][0] for name in names if shapes.get(name)), 0)

    mlp = scan.replace("ss2d", "mlp")
    blocks = {match[0] for match in map(re.compile(r"stages\.(\d+)\.blocks\.\d+\.").match, shapes) if match}
    depths = Counter(int(name.split(".")[1]) for name in blocks)
    firsts = [f"stages.{stage}.blocks.0." for stage in sorted(depths)]
    stem = "conv" if "stem.conv2.weight" in shapes else "small" if "stem.conv1.weight" in shapes else "patch"
    options = {
        "depths": tuple(depth for _, depth in sorted(depths.items())),
        "dims": tuple(first(f"{name}ss2d.out_proj.weight", f"{name}mlp.conv2.weight") for name in firsts),
        "d_state": shapes[f"{scan}A_log"][-1],
        "ssm_ratio": inner / dim,
        "conv_bias": f"{scan}conv.bias" in shapes,
        "gated": first(f"{scan}in_proj.weight") == 2 * inner,
        "mlp": "local" if f"{mlp}conv1.weight" in shapes else "pixel",
        "stem": "wide" if shapes.get("stem.conv1.weight", ())[2:] == (7, 7) else stem,
        "downsample": "merge" if any(name.endswith("downsample.reduction.weight") for name in shapes) else "conv",
    }
    if options["mlp"] == "pixel":
        options["mlp_ratio"] = first(f"{mlp}fc1.weight") / dim
    return options


def _adapted(weight: Tensor, channels: int) -> Tensor:
    """The first convolution's weights for images of another number of channels; what cannot be adapted stays."""
    if weight.ndim != 4 or weight.numel() == 0:
        return weight
    return adapt_input_conv(channels, weight, base_chans=weight.shape[1])


def _reset(name: str, target: Tensor) -> None:
    """Draw a parameter of the head or the final norm anew, as a new model does."""
    if name.endswith("bias"):
        nn.init.zeros_(target)
    elif target.ndim > 1:
        nn.init.trunc_normal_(target, std=0.02)
    else:
        nn.init.ones_(target)
