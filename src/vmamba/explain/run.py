"""One run of `vmamba explain`: the model, the settings, and where figures go."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from vmamba.explain.config import ExplainConfig, listed
from vmamba.explain.images import Seen, preprocessing_for, see
from vmamba.files import shown
from vmamba.models.folders import is_source
from vmamba.tasks.prediction import Weights, class_names, load_weights, moved

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Step(NamedTuple):
    """One thing that was looked at: of a photo, or of the model as a whole."""

    subject: str
    part: str
    figures: tuple[str, ...] = ()
    error: str | None = None


@dataclass
class Explanation:
    """A run of `vmamba explain`.

    Attributes:
        weights: the model, on its device.
        config: the settings.
        written: the figures written since the last step.
    """

    weights: Weights
    config: ExplainConfig
    written: list[str] = field(default_factory=list)

    def step(self, subject: str, part: str) -> Step:
        """What has been done since the last step."""
        done = Step(subject, part, tuple(self.written))
        self.written.clear()
        return done

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.weights.model

    @cached_property
    def names(self) -> list[str]:
        """Names of the classes."""
        stored = self.weights.metadata.get("class_names") or getattr(self.model, "class_names", None) or []
        return class_names(stored, self.model)

    @cached_property
    def others(self) -> dict[str, nn.Module]:
        """The networks to put beside this one."""
        found = {}
        for other in listed(self.config.beside):
            weights = load_weights(other) if is_source(other) or Path(other).exists() else load_weights(name=other)
            found[shown(other)] = moved(weights.model, self.config.device)
        return found

    def see(self, photo: str) -> Seen:
        """What the model sees of a photo."""
        pre = preprocessing_for(self.model, self.config.img_size, self.weights.metadata)
        return see(self.model, photo, pre=pre)

    def write(self, figure: Figure, name: str) -> str:
        """Write a figure as NAME.png; returns its path."""
        from vmamba.explain import figures

        path = Path(self.config.output) / f"{name}.png"
        figures.write(figure, path)
        self.written.append(shown(path))
        return shown(path)
