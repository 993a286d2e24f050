"""What `vmamba explain` does: figures into a folder, and their numbers into one JSON file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from torch import nn

from vmamba.errors import ImageError, RecipeError
from vmamba.explain.config import FORGOTTEN, ExplainConfig, listed
from vmamba.explain.images import Seen
from vmamba.explain.run import Explanation, Step
from vmamba.explain.scans import Recording, record_scans
from vmamba.files import atomic_write, json_bytes, shown
from vmamba.models.feature_maps import DenseModel
from vmamba.nn import SS2D
from vmamba.tasks.prediction import Weights, load_weights, moved
from vmamba.tasks.runs import LATEST, RunFolder
from vmamba.tasks.segmenter import output_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHOTO_PARTS: dict[str, str] = {
    "stages": "vmamba.explain.report:stages",
    "activation": "vmamba.explain.report:activation",
    "memory": "vmamba.explain.report:memory",
    "matrix": "vmamba.explain.report:matrix",
    "class": "vmamba.explain.report:classes",
}
"""What can be seen of a photo: functions from a `Look` to numbers for JSON, by their word in ``--what``."""
MODEL_PARTS: dict[str, str] = {
    "depth": "vmamba.explain.depth:report",
    "field": "vmamba.explain.receptive_field:report",
    "scaling": "vmamba.explain.scaling:report",
    "accuracy": "vmamba.explain.resolution:report",
    "patterns": "vmamba.explain.scan_patterns:report",
}
"""What can be seen of a model: functions from an `Explanation` and the photos to numbers for JSON."""


@dataclass
class Look:
    """One photo, looked at.

    Attributes:
        of: the run.
        photo: its file.
        seen: the photo, as the model sees it.
        folder: where its figures go, inside the run's folder.
    """

    of: Explanation
    photo: str
    seen: Seen
    folder: str

    @cached_property
    def recording(self) -> Recording:
        """The scans of one pass."""
        return record_scans(self.of.model, self.seen)

    @property
    def query(self) -> tuple[float, float] | None:
        """The place asked about, in pixels of the photo as it is seen."""
        place = self.of.config.place
        return None if place is None else self.seen.locate(*place)

    def blocks(self) -> list[str]:
        """The blocks asked about; else the last of each stage, of networks without stages the last of all."""
        asked = listed(self.of.config.block)
        if asked:
            numbers = [int(name) if name.lstrip("-").isdigit() else name for name in asked]
            return [self.recording.scan(name).block for name in numbers]
        last = {self.recording.scan(name).label.partition(",")[0]: name for name in self.recording.blocks}
        named = [name for stage, name in last.items() if stage.startswith("stage ")]
        return named or [self.recording.blocks[-1]]

    def write(self, figure: Figure, name: str) -> str:
        """Write a figure of the photo."""
        return self.of.write(figure, f"{self.folder}/{name}")


def explain(config: ExplainConfig, photos: Sequence[str]) -> Iterator[Step]:
    """Look at photos one after another, and write figures and explain.json into ``config.output``.

    Yields:
        What has been looked at. A photo that cannot be read is a step with an error, and the others are done; so is one
        of several that does not have what is asked for, such as a place outside of it.

    Raises:
        RecipeError: settings that are wrong, or that ask for what the model or the only photo does not have.
        CheckpointError: the model's file cannot be used.
    """
    _ = config.place  # refused before any work
    parts = listed(config.what)
    known = [*PHOTO_PARTS, *MODEL_PARTS]
    if unknown := [part for part in parts if part not in known]:
        raise RecipeError(f"what names {unknown[0]!r}; expected some of {', '.join(known)}, with commas between")
    if not photos and {*parts} <= {*PHOTO_PARTS}:
        raise RecipeError("no photos were named; expected one or more image files")
    asked = config.checkpoint, config.pretrained
    if {*parts} == {"patterns"} and asked == (None, None) and not RunFolder(LATEST).model.exists():
        weights = Weights(nn.Module(), {}, "")  # patterns that have a name need no model
    else:
        weights = load_weights(*asked, config.ema)
    run = Explanation(weights._replace(model=moved(weights.model, config.device)), config)
    parts = parts or _possible(run.model)
    found: list[dict[str, Any]] = []
    for photo, name in zip(photos, output_names(photos), strict=True):
        about: dict[str, Any] = {"file": shown(photo)}
        found.append(about)
        part = ""
        try:
            look = Look(run, photo, run.see(photo), name.removesuffix(".png"))
            about |= {"size": look.seen.sizes[0], "seen": look.seen.size, "part": look.seen.parts[0]}
            for part in filter(PHOTO_PARTS.__contains__, parts):
                about[part] = resolve_name(PHOTO_PARTS[part])(look)
                yield run.step(photo, part)
        except ImageError as error:
            about["error"] = str(error)
        except RecipeError as error:
            about["error"] = f"{shown(photo)}: {error}"
            if len(photos) == 1:
                if not PHOTO_PARTS.keys().isdisjoint(about):  # what it showed before is not lost
                    _save(run, found, {})
                raise
        if "error" in about:
            yield run.step(photo, part)._replace(error=about["error"])
    whole: dict[str, Any] = {}
    try:
        for part in filter(MODEL_PARTS.__contains__, parts):
            whole[part] = resolve_name(MODEL_PARTS[part])(run, photos)
            yield run.step(weights.source, part)
    except RecipeError:
        if not PHOTO_PARTS.keys().isdisjoint(parts):  # what the photos showed is not lost
            _save(run, found, whole)
        raise
    _save(run, found, whole)


def _save(run: Explanation, found: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    """Write explain.json."""
    path = Path(run.config.output) / "explain.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    variant = str(getattr(run.model, "variant", None) or type(run.model).__name__)
    about = {"model": variant, "weights": shown(run.weights.source)} if run.weights.source else {}
    with atomic_write(path) as file:
        file.write(json_bytes({**about, "photos": found, **whole}))


def _possible(model: nn.Module) -> list[str]:
    scanning = any(isinstance(module, SS2D) for module in model.modules())
    answering = isinstance(model, DenseModel) or getattr(model, "num_classes", 0) > 0
    return ["stages", *["activation", "memory"] * scanning, *["class"] * answering]


# --- the parts -------------------------------------------------------------------------------------------------------


def stages(look: Look) -> dict[str, Any]:
    """Stage maps of a photo."""
    from vmamba.explain.stage_maps import stage_maps

    found = stage_maps(look.of.model, look.seen)
    return {"figure": look.write(found.figure(), "stages"), "stages": found.numbers()}


def activation(look: Look) -> list[dict[str, Any]]:
    """What the patch at the query is made of, in each of the blocks."""
    found = [look.recording.maps(look.query, block) for block in look.blocks()]
    return [{"figure": look.write(m.figure(), _file("activation", m.scan.label))} | m.numbers() for m in found]


def memory(look: Look) -> list[dict[str, Any]]:
    """How long each patch is remembered, in each of the blocks."""
    share = FORGOTTEN if look.of.config.share is None else look.of.config.share
    found = [look.recording.selectivity(block, share) for block in look.blocks()]
    return [{"figure": look.write(s.figure(), _file("memory", s.scan.label))} | s.numbers() for s in found]


def matrix(look: Look) -> list[dict[str, Any]]:
    """The whole matrix of who hears whom: of the blocks asked about, or of the last of the stages that are small."""
    from vmamba.explain.attention import MOST_PATCHES, vit_attention

    others = [vit_attention(model, look.photo) for model in look.of.others.values()]
    scans = [look.recording.scan(block) for block in look.blocks()]
    if not look.of.config.block:
        scans = [scan for scan in scans if len(scan.orders[0]) <= MOST_PATCHES] or scans[-1:]
    results = []
    for scan in scans:
        found = look.recording.matrix(scan.block)
        path = look.write(found.figure(*others, query=look.query), _file("matrix", scan.label))
        results.append({"figure": path, "block": scan.block, "grid": scan.grid, "heard": found.values.sum(0).tolist()})
    return results


def classes(look: Look) -> dict[str, Any]:
    """What made the answer; without a figure where a detector finds nothing."""
    from vmamba.explain.class_maps import NothingFoundError, class_maps

    place = look.query if look.of.config.query and isinstance(look.of.model, DenseModel) else None
    try:
        found = class_maps(look.of.model, look.seen, look.of.config.target, place, class_names=look.of.names)
    except NothingFoundError as error:
        return {"figure": None, "target": None, "nothing_found": str(error)}
    return {"figure": look.write(found.figure(), "class")} | found.numbers()


def _file(kind: str, label: str) -> str:
    return f"{kind}_{label.replace(', ', '_').replace(' ', '').replace('.', '_').replace('/', '_')}"
