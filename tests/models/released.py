"""Weight files as others write them: golden weights, released names, a pickled yacs config without yacs."""

from __future__ import annotations

import functools
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


@functools.cache
def layouts() -> dict[str, dict[str, Any]]:
    """What is known of the nine published variants; see tests/golden/README.md."""
    return json.loads((GOLDEN / "layouts.json").read_text())


def golden_weights(variant: str) -> dict[str, Tensor]:
    """The weights that the golden numbers were made with, under the names in `keys`."""
    weights = {}
    for name, shape, mean, std in layouts()[variant]["keys"]:
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        weights[name] = torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32))
    return weights


def as_released(variant: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names that the variant's released file uses."""
    older = layouts()[variant].get("released_names", {})
    return {older.get(name, name): tensor for name, tensor in weights.items()}


def theirs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any VMamba of ours under the released names and in the released shapes."""
    conv_stem = {"stem.conv1": "patch_embed.0", "stem.norm1": "patch_embed.2", "stem.conv2": "patch_embed.5"}
    patch_stem = {"stem.conv": "patch_embed.0", "stem.norm": "patch_embed.2"}
    leaves = {
        "norm1": "norm",
        "ss2d.conv": "op.conv2d",
        "ss2d.norm": "op.out_norm",
        "ss2d.x_proj_weight": "op.x_proj_weight",
        "ss2d.dt_proj_weight": "op.dt_projs_weight",
        "ss2d.dt_proj_bias": "op.dt_projs_bias",
        "ss2d.A_log": "op.A_logs",
        "ss2d.D": "op.Ds",
        "ss2d.in_proj": "op.in_proj",
        "ss2d.out_proj": "op.out_proj",
    }
    others = {"norm": "classifier.norm", "head.fc": "classifier.head", **conv_stem, **patch_stem}
    others["stem.norm2"] = "patch_embed.7"
    renamed = {}
    for name, tensor in state.items():
        if block := re.match(r"stages\.(\d+\.blocks\.\d+)\.(.+?)(\.weight|\.bias|)$", name):
            leaf = leaves.get(block[2], block[2])
            shaped = tensor.flatten(0, 1) if leaf in ("op.A_logs", "op.Ds") else tensor
            renamed[f"layers.{block[1]}.{leaf}{block[3]}"] = shaped
        elif between := re.match(r"stages\.(\d+)\.downsample\.(\w+)\.(\w+)$", name):
            merges = f"stages.{between[1]}.downsample.reduction.weight" in state
            module = between[2] if merges else {"conv": "1", "norm": "3"}[between[2]]
            renamed[f"layers.{int(between[1]) - 1}.downsample.{module}.{between[3]}"] = tensor
        else:
            module, _, leaf = name.rpartition(".")
            renamed[f"{others[module]}.{leaf}"] = tensor
    return renamed


def older(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the first released files."""
    renamed = {}
    for name, tensor in theirs(state).items():
        for new, old in {
            "patch_embed.0.": "patch_embed.proj.", "patch_embed.2.": "patch_embed.norm.", ".op.": ".self_attention.",
            "classifier.": "",
        }.items():  # fmt: skip
            name = name.replace(new, old)
        if ".blocks." in name:
            name = name.replace(".norm.", ".ln_1.")
        renamed[name] = tensor
    return renamed


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def as_later(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released names as some later files have them: scan projections of shape (K·rows, D, 1), 1×1 convolutions."""
    later = {}
    for name, tensor in weights.items():
        if name.endswith(("x_proj_weight", "dt_projs_weight")):
            later[name.replace("_weight", ".weight")] = tensor.flatten(0, 1).unsqueeze(-1)
        elif re.search(r"(in_proj|out_proj|fc1|fc2|head)\.weight$", name):
            later[name] = tensor[:, :, None, None]
        else:
            later[name] = tensor
    return later


@contextmanager
def foreign_class(path: str, bases: tuple[type, ...] = (), **members: Any) -> Iterator[type]:
    """A class that can be pickled under a dotted path of a package that is not installed, gone afterwards."""
    module_name, _, name = path.rpartition(".")
    parts = module_name.split(".")
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    assert not any(module in sys.modules for module in modules)
    sys.modules.update({module: ModuleType(module) for module in modules})
    try:
        made = type(name, bases, {"__module__": module_name, "__qualname__": name, **members})
        setattr(sys.modules[module_name], name, made)
        yield made
    finally:
        for module in modules:
            del sys.modules[module]


@contextmanager
def yacs_config() -> Iterator[dict[str, Any]]:
    """A nested yacs.config.CfgNode: a dict subclass with attributes of its own."""
    with foreign_class("yacs.config.CfgNode", (dict,)) as node:

        def make(values: dict[str, Any]) -> dict[str, Any]:
            made = node({key: make(value) if isinstance(value, dict) else value for key, value in values.items()})
            made.__dict__.update(
                __immutable__=True, __deprecated_keys__=set(), __renamed_keys__={}, __new_allowed__=False
            )
            return made

        yield make({"MODEL": {"NAME": "vssm", "DROP_PATH_RATE": 0.2, "DEPTHS": [2, 2, 8, 2]}, "SEED": 0, "AMP": None})


def write_released(
    path: Path, weights: dict[str, Tensor], ema: dict[str, Tensor] | None = None, **options: Any
) -> Path:
    """Write a file as the authors' training code does; options are torch.save's."""
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05, "foreach": None, "params": [0]}
    contents: dict[str, Any] = {
        "model": weights,
        "optimizer": {"state": {0: moments}, "param_groups": [group]},
        "lr_scheduler": {"base_values": [1e-3], "t_initial": 375300, "cycle_mul": 1.0, "noise_range_t": None},
        "max_accuracy": 82.5,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
        "epoch": 264,
    }
    if ema is not None:
        contents |= {"model_ema": ema, "max_accuracy_ema": 82.6}
    with yacs_config() as config:
        torch.save(contents | {"config": config}, path, **options)
    return path
