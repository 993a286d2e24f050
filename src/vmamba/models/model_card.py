"""The page that a model on the Hugging Face Hub begins with, written from what is known of it, and of nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from timm.layers import to_2tuple
from torch import nn

from vmamba.models.checkpoints import default_metadata
from vmamba.models.complexity import profile
from vmamba.models.variants import VARIANTS

_UNNAMED = "the validation images"
_LISTED = 60  # classes that are named on the page; config.json names all
_PIPELINES = {
    "classification": "image-classification",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
}
# By key of metrics.json: its name on the page, and the hub's, if it has one.
_SCORES = {
    "top1": ("top-1 accuracy", "accuracy"),
    "top5": ("top-5 accuracy", None),
    "mIoU": ("mIoU", "mean_iou"),
    "mAcc": ("mean accuracy of the classes", None),
    "aAcc": ("accuracy of all pixels", None),
    "box_AP": ("box AP", "map"),
    "box_AP50": ("box AP at IoU 0.5", None),
    "box_AP75": ("box AP at IoU 0.75", None),
    "mask_AP": ("mask AP", "map"),
    "mask_AP50": ("mask AP at IoU 0.5", None),
    "mask_AP75": ("mask AP at IoU 0.75", None),
}
_CITATION = """\
@inproceedings{liu2024vmamba,
  title = {{VMamba}: Visual State Space Model},
  author = {Liu, Yue and Tian, Yunjie and Zhao, Yuzhong and Yu, Hongtian and Xie, Lingxi and Wang, Yaowei
            and Ye, Qixiang and Jiao, Jianbin and Liu, Yunfan},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}
}"""


@dataclass(frozen=True)
class CardFacts:
    """What is known of a model beside the model; everything that is None stays unsaid.

    Attributes:
        name: what the model is called, as the hub does: the folder's name.
        repository: "OWNER/NAME" on the hub, for the commands.
        license: as the hub abbreviates it: "mit", "apache-2.0", "cc-by-4.0", "other", ...
        data: what the training images are called; by default as the recipe calls them, a folder by its name.
        recipe: the settings of the training run, as its config.yaml holds them. Of files and folders only the name is
            told.
        results: what `vmamba validate` wrote to metrics.json.
    """

    name: str
    repository: str | None = None
    license: str | None = None
    data: str | None = None
    recipe: Mapping[str, Any] | None = None
    results: Mapping[str, Any] | None = None


def model_card(model: nn.Module, metadata: Mapping[str, Any] | None, facts: CardFacts) -> str:
    """Write the page: a YAML header that the hub reads, then the model, its use, data, results, recipe and limits.

    Args:
        model: a classifier or backbone of timm's or ours, or a model for segmentation or detection of ours.
        metadata: as `load_model` returns it.
        facts: what else is known.

    Returns:
        Markdown. Scores are those of `facts.results`, or else those that the last epoch left in the metadata; without
        either there are none.
    """
    known = {**default_metadata(model), **(metadata or {})}
    told = {name: value for name, value in known.items() if value is not None}
    card = _Card(model, told, facts)
    sections = [
        f"# {_plain(facts.name)}\n\n{card.introduction()}",
        *(f"## {title}\n\n{text}" for title, text in card.sections().items() if text),
    ]
    return f"---\n{card.header()}\n---\n\n" + "\n\n".join(sections) + "\n"


class _Card:
    def __init__(self, model: nn.Module, told: Mapping[str, Any], facts: CardFacts) -> None:
        self.model, self.told, self.facts = model, told, facts
        self.task = str(told.get("task") or "classification")
        self.variant = str(told.get("variant") or type(model).__name__)
        self.names: Sequence[str] = told.get("class_names") or []
        self.classes = int(told.get("num_classes") or 0)
        self.chans = int(told.get("in_chans") or 3)
        self.recipe = dict(facts.recipe or {})
        self.repository = facts.repository or f"OWNER/{facts.name}"
        self.is_grey = self.chans == 1
        self.scores, self.origin = self._scores()
        self.data, self.hub_data = self._data()

    # --- What is known ------------------------------------------------------------------------------------------------

    def _scores(self) -> tuple[dict[str, float], str]:
        """Scores by key, and where they are from: "results", "epoch" or ""."""
        results = self.facts.results or {}
        epoch = {key.removeprefix("val_"): value for key, value in self.told.items() if key.startswith("val_")}
        for origin, values in (("results", results), ("epoch", epoch)):
            found = {key: values[key] for key in _SCORES if isinstance(values.get(key), int | float)}
            if found:
                return found, origin
        return {}, ""

    def _data(self) -> tuple[str, str | None]:
        """What the training images are called, and their name on the hub."""
        data = self.recipe.get("data") or {}
        kind, _, name = str(data.get("dataset") or "").partition("/")
        hub = name if kind in ("hfds", "hfids") and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None
        of_folder = re.sub(r"\.tar$", "", _last(str(data.get("root") or "")))
        return self.facts.data or (hub or _last(name) or of_folder), hub

    def _measured_on(self) -> str:
        """What the images are called that the results are from."""
        if self.origin == "epoch":
            return f"{_UNNAMED} of {self.data}" if self.data else _UNNAMED
        place, data = str((self.facts.results or {}).get("data") or ""), self.recipe.get("data") or {}
        own = [str(data.get(key)) for key in ("dataset", "root", "val_root", "val_annotations") if data.get(key)]
        if self.data and any(place.startswith(name) for name in own):
            return f"{_UNNAMED} of {self.data}"
        return "/".join(re.split(r"[\\/]", place.rstrip("/"))[-2:]) or _UNNAMED

    # --- The page -----------------------------------------------------------------------------------------------------

    def header(self) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        pipeline = _PIPELINES[self.task] if self.classes else "image-feature-extraction"
        results = [
            EvalResult(
                task_type=pipeline, dataset_type=self.hub_data or re.sub(r"\W+", "-", on.lower()).strip("-"),
                dataset_name=on, dataset_split="validation", metric_type=kind, metric_name=label,
                metric_value=round(self.scores[key], 4),
            )
            for key, (label, kind) in _SCORES.items()
            if kind and key in self.scores and (on := self._data_of_results())
        ]  # fmt: skip
        tags = [pipeline, "vision", "vmamba" if self._is_ours() else "timm"]
        tags += ["instance-segmentation"] if self._has_masks() else []
        tags += ["timm", *(["transformers"] if self.chans == 3 else [])] if self.task == "classification" else []
        data = ModelCardData(
            license=self.facts.license,
            library_name="timm" if self.task == "classification" else "vmamba",
            pipeline_tag=pipeline,
            tags=list(dict.fromkeys(tags)),
            datasets=[self.hub_data] if self.hub_data else None,
            metrics=list(dict.fromkeys(kind for key in self.scores if (kind := _SCORES[key][1]))) or None,
            model_name=self.facts.name if results else None,
            eval_results=results or None,
        )
        return data.to_yaml()

    def _data_of_results(self) -> str:
        """What the hub is to call the data of the results; empty where nobody has told."""
        on = self._measured_on()
        return "" if on == _UNNAMED else on.removeprefix(f"{_UNNAMED} of ")

    def _is_ours(self) -> bool:
        return self.task != "classification" or self.variant in VARIANTS

    def introduction(self) -> str:
        """Name, task and classes in one paragraph."""
        what = {
            "classification": "classifier" if self.classes else "backbone without a classifier",
            "segmentation": "model for semantic segmentation",
            "detection": "model for detection" + (" and instance segmentation" if self._has_masks() else ""),
        }[self.task]
        text = f"A {what}, `{self.variant}`"
        if backbone := (self.told.get("model_kwargs") or {}).get("backbone"):
            text += f" on `{backbone}`"
        if not self.classes:
            return f"{text}."
        if not self.names:
            return f"{text}, with {self.classes} classes, whose names are not known."
        shown = ", ".join(map(_plain, self.names[:_LISTED]))
        more = f", and {len(self.names) - _LISTED} more that config.json names" if len(self.names) > _LISTED else ""
        return f"{text}, with {self.classes} classes: {shown}{more}."

    def sections(self) -> dict[str, str]:
        """The rest of the page by titles, empty where nothing is known."""
        return {
            "Model": self._model(),
            "Use": self._use(),
            "Data": self._data_text(),
            "Results": self._results(),
            "Recipe": self._recipe(),
            "Preprocessing": self._preprocessing(),
            "Limits": self._limits(),
            "Citation": f"```bibtex\n{_CITATION}\n```" if self._is_ours() and self._has_vmamba() else "",
        }

    def _has_masks(self) -> bool:
        return getattr(getattr(self.model, "roi_head", None), "mask_head", None) is not None

    def _has_vmamba(self) -> bool:
        return any(type(module).__name__ == "SS2D" for module in self.model.modules())

    def _model(self) -> str:
        cost = profile(self.model, self.told.get("sides") or self.told.get("img_size"))
        size = "×".join(map(str, cost.img_size))
        return _table(
            ("", ""),
            [
                ("parameters", f"{cost.params / 1e6:.1f} M"),
                (f"multiply-accumulates at {size}", f"{cost.flops / 1e9:.2f} G"),
                ("images", f"{'grey' if self.is_grey else 'RGB' if self.chans == 3 else f'{self.chans} channels'}"),
            ],
        )

    def _use(self) -> str:
        place = f'"hf-hub:{self.repository}"'
        text = "With the package `vmamba` installed"
        text += " (`local-dir:FOLDER` in place of `hf-hub:OWNER/NAME` reads a copy on the disk):\n\n"
        if self.chans in (1, 3) and self.classes:
            text += f"```bash\nvmamba predict photo.jpg --checkpoint hf-hub:{self.repository}\n```\n\n"
        height, width = (min(side, 512) for side in to_2tuple(self.told.get("img_size") or 224))
        gives = {
            "classification": f"# (1, {self.classes})" if self.classes else "# features",
            "segmentation": f"# (1, {self.classes}, {height}, {width})",
            "detection": "# for each image a dictionary: boxes, scores, labels" + ", masks" * self._has_masks(),
        }[self.task]
        text += (
            "```python\nimport torch\nimport vmamba\n\n"
            f"model = vmamba.create_model({place}, pretrained=True).eval()\nwith torch.no_grad():\n"
            f"    found = model(torch.zeros(1, {self.chans}, {height}, {width}))  {gives}\n```"
        )
        if self.task != "classification" or not self.classes:
            return text
        text += "\n\n`timm.create_model` takes the same name"
        if self.chans == 3:
            return f'{text}, and so does `transformers.pipeline("image-classification", model=...)`' + (
                "; `import vmamba` comes first, for that makes the network known to timm." if self._is_ours() else "."
            )
        text += "; `import vmamba` comes first." if self._is_ours() else "."
        return f"{text} transformers' pipelines do not, for they give RGB and it takes {self._channels()}."

    def _channels(self) -> str:
        return "one grey channel" if self.is_grey else f"{self.chans} channels"

    def _data_text(self) -> str:
        if not self.data:
            return ""
        linked = f"[{self.hub_data}](https://huggingface.co/datasets/{self.hub_data})" if self.hub_data else self.data
        return f"Trained on {linked if self.hub_data == self.data else _plain(self.data)}."

    def _results(self) -> str:
        if not self.scores:
            return ""
        results = (self.facts.results or {}) if self.origin == "results" else {}
        count = results.get("images")
        head = f"On {_plain(self._measured_on())}" + (f", {count:,} of them" if isinstance(count, int) else "")
        head += f", at the end of epoch {self.told['epoch']}" if self.origin == "epoch" and "epoch" in self.told else ""
        text = f"{head}:\n\n" + _table(("", ""), [(_SCORES[key][0], f"{v:.2%}") for key, v in self.scores.items()])
        rows, columns = _per_class(results.get("per_class"))
        if rows:
            table = _table(("class", *columns), rows)
            text += f"\n\n<details><summary>Class by class</summary>\n\n{table}\n\n</details>"
        return text

    def _recipe(self) -> str:
        recipe, optim, model = self.recipe, self.recipe.get("optim") or {}, self.recipe.get("model") or {}
        if not optim:
            return ""
        start = (
            "published weights"
            if model.get("pretrained")
            else "a file of weights"
            if model.get("checkpoint")
            else "none"
        )
        rows = [
            ("initial weights", start),
            ("epochs", optim.get("epochs")),
            ("epoch of these weights", self.told.get("epoch")),
            ("optimiser", optim.get("optimizer")),
            ("learning rate", optim.get("lr")),
            ("images in a step, on each device", (recipe.get("data") or {}).get("batch_size")),
            ("schedule", optim.get("schedule")),
            ("weight decay", optim.get("weight_decay")),
            ("moving average of the weights", optim.get("ema_decay") or "none"),
            ("seed", recipe.get("seed")),
        ]
        table = _table(("", ""), [(name, str(value)) for name, value in rows if value is not None])
        settings = yaml.safe_dump(_without_places(recipe), sort_keys=False, allow_unicode=True)
        details = f"<details><summary>All settings, for `vmamba train --config`</summary>\n\n```yaml\n{settings}```\n\n"
        return f"{table}\n\n{details}</details>"

    def _preprocessing(self) -> str:
        told = self.told
        if self.chans not in (1, 3):
            return ""
        height, width = told.get("sides") or to_2tuple(told.get("img_size") or 224)
        if self.task == "classification":
            crop = float(told.get("crop_pct", 1.0))
            filled = f"{int(height / crop)}×{int(width / crop)}"
            size = {
                "squash": f"the picture is squashed to {filled}",
                "border": f"the picture is resized in its own ratio to fit into {filled}, and bordered",
            }.get(told.get("crop_mode", "center"))
            if size is None and height == width:
                size = f"the short side is resized to {int(height / crop)} pixels"
            elif size is None:
                size = f"the picture is resized by its height and width to fill {filled}"
            steps = [f"{size} ({told.get('interpolation', 'bicubic')})", f"the middle {height}×{width} is cut out"]
        else:
            sides = min(height, width), max(height, width)
            steps = [f"pictures are resized, bilinearly, to fit into sides of {sides[0]} (short) and {sides[1]} (long)"]
        kind = "grey" if self.is_grey else "RGB"
        steps.append(f"{kind} values from 0 to 1, less {_list(told.get('mean'))}, by {_list(told.get('std'))}")
        return "\n".join(f"{number}. {step[0].upper()}{step[1:]}." for number, step in enumerate(steps, start=1))

    def _limits(self) -> str:
        results = (self.facts.results or {}) if self.origin == "results" else {}
        lines = []
        if self.classes and self.task == "classification":
            lines.append("It names one of its classes for any picture, also for one that shows none of them.")
        elif self.classes:
            lines.append(
                "It knows its classes alone; whatever else a picture shows is taken for one of them or missed."
            )
        if self.scores:
            on = _plain(self._measured_on())
            lines.append(f"Its scores hold for pictures like {on}; for others they have not been measured.")
        else:
            lines.append("No scores of it are known.")
        if self.is_grey or self.told.get("colours") is False:
            lines.append("It sees no colour.")
        if worst := _worst(results.get("per_class")):
            lines.append(f"It is weakest at {worst}.")
        if not self.facts.license:
            lines.append("No licence is named for these weights: ask their author before you use them.")
        return "\n".join(f"- {line}" for line in lines)


# --- Text ------------------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Text that Markdown and HTML take for what it is."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*|<>\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(values: Any) -> str:
    return " / ".join(f"{value:g}" for value in values or ())


def _last(place: str) -> str:
    """The last part of a path, whichever system wrote it."""
    return os.path.basename(place.replace("\\", "/").rstrip("/"))


def _without_places(settings: Any, key: str = "") -> Any:
    """Settings that tell of files and folders only their names, for paths tell of the machine and who uses it."""
    if isinstance(settings, dict):
        return {name: _without_places(value, name) for name, value in settings.items()}
    if isinstance(settings, list):
        return [_without_places(value, key) for value in settings]
    is_name = key == "dataset" and isinstance(settings, str) and "//" not in settings
    return _last(settings) if isinstance(settings, str) and not is_name else settings


def _score_of(value: Any) -> dict[str, float]:
    """The scores of one class: of a classifier its accuracy alone."""
    values = value if isinstance(value, Mapping) else {"accuracy": value}
    wanted = {"IoU": "IoU", "accuracy": "accuracy", "box_AP": "box AP", "mask_AP": "mask AP"}
    return {label: float(values[k]) for k, label in wanted.items() if isinstance(values.get(k), int | float)}


def _per_class(found: Any) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows of the table of classes, and its columns."""
    if not isinstance(found, Mapping):
        return [], []
    scores = {str(name): _score_of(value) for name, value in found.items()}
    columns = list(dict.fromkeys(label for values in scores.values() for label in values))
    rows = [
        (_plain(name), *(f"{values[label]:.1%}" if label in values else "–" for label in columns))
        for name, values in scores.items()
    ]
    return rows, columns


def _worst(found: Any) -> str:
    """The class with the lowest score, and the score."""
    if not isinstance(found, Mapping):
        return ""
    first = {str(name): next(iter(_score_of(value).items()), None) for name, value in found.items()}
    known = {name: score for name, score in first.items() if score is not None}
    if len(known) < 2:
        return ""
    name = min(known, key=lambda each: known[each][1])
    label, value = known[name]
    return f"{_plain(name)} ({label} {value:.1%})"
