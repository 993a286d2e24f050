"""A second task, as small as one can be: the mean colour of an image. Lower is better, batches are lists of images of
any size, the loss has two parts, validation makes a picture, and the model file is for no classifier."""

from dataclasses import dataclass, field

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from vmamba.data.loading import EpochLoader, Samples
from vmamba.tasks import TASKS, Parts
from vmamba.tasks.prediction import Outcome, Predictor, each_file
from vmamba.tasks.recipe import BaseTrainConfig, BaseValidateConfig, ModelConfig, OptimConfig, TrainerConfig
from vmamba.tasks.task import Means, Score, Task, build_model


@dataclass
class ToyData:
    """Where the toy's images are: just how many there are, for they are drawn."""

    root: str | None = None
    """Any text."""
    images: int = 24
    """How many."""
    batch_size: int = 4
    """Images in a step."""


@dataclass
class ToyTrainConfig(BaseTrainConfig):
    """Learn colours."""

    task: str = "toy"
    data: ToyData = field(default_factory=ToyData)
    """The toy's images"""


@dataclass
class ToyValidateConfig(BaseValidateConfig):
    """Measure how well colours are known."""

    task: str = "toy"
    data: ToyData = field(default_factory=ToyData)
    """The toy's images"""


class Drawn:
    def __init__(self, count, noisy):
        self.count, self.noisy = count, noisy

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        colour = np.random.default_rng(abs(index)).random(3, dtype=np.float32)
        image = torch.from_numpy(colour)[:, None, None].expand(3, 8 + index % 3, 8)
        noise = torch.rand(image.shape) / 10 if self.noisy else 0  # seeded by the ticket
        return image + noise, {"colour": torch.from_numpy(colour), "filler": index < 0}


@timm.models.register_model
def toy_colours(pretrained=False, **kwargs):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model.pretrained_cfg, model.num_classes = {"first_conv": "0", "classifier": "4"}, 3
    return model


class Toy(Task):
    name = "toy"
    score = Score("error", "colour error", higher_is_better=False, percent=False)

    def __init__(self, model, data, recipe=None):
        super().__init__(model, recipe)
        self.data = data

    @classmethod
    def from_recipe(cls, recipe):
        return cls(build_model(recipe.model, recipe.seed), recipe.data, recipe)

    @classmethod
    def from_weights(cls, config, weights):
        return cls(weights.model, config.data)

    def loader(self, training):
        samples = Samples(Drawn(self.data.images, training))
        return EpochLoader(samples, self.data.batch_size, training, collate=list, **self.place)

    def loss(self, batch):
        error = [self.model(image[None])[0] - target["colour"] for image, target in batch]
        return {"square": torch.stack(error).square().mean(), "absolute": torch.stack(error).abs().mean() / 10}

    def on_validation_epoch_start(self):
        self.means, self.swatches = Means(self.device), []

    def judge(self, batch):
        for image, target in batch:
            if not target["filler"]:
                self.swatches.append(self.network(image[None])[0])
                self.means.add("error", (self.swatches[-1] - target["colour"]).abs().mean(), 1)

    def results(self):
        return self.means.compute(self.trainer.strategy)

    def details(self):
        return {"images": len(self.swatches), "data": "drawn"}

    def show(self, folder):
        pixels = torch.stack(self.swatches).clamp(0, 1).mul(255).byte()[None]
        Image.fromarray(pixels.cpu().numpy()).save(folder / "swatches.png")

    def metadata(self):
        return {"in_chans": 3}


@dataclass(frozen=True)
class Colour(Outcome):
    columns = ("file", "red", "green", "blue")
    right = (1, 2, 3)

    file: str
    colour: tuple[float, ...] = ()
    error: str | None = None

    def rows(self, exact):
        return [(self.file, *(f"{value:.{6 if exact else 1}f}" for value in self.colour))] if self.colour else []


class ToyPredictor(Predictor):
    outcome = Colour

    def __init__(self, weights):
        self.model, self.source = weights.model, weights.source

    @classmethod
    def from_weights(cls, weights, settings=None):
        return cls(weights)

    @torch.inference_mode()
    def outcomes(self, files, config):
        def infer(samples):
            return [tuple(self.model(sample[None])[0].tolist()) for sample in samples]

        def transform(image):
            return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)

        for file, found in each_file(files, 3, transform, infer, config.batch_size, config.workers):
            yield Colour(file, error=str(found)) if isinstance(found, Exception) else Colour(file, found)


TASKS["toy"] = Parts(*(f"tasks.toy:{name}" for name in ("ToyTrainConfig", "ToyValidateConfig", "Toy", "ToyPredictor")))


def toy_recipe(run, **optim):
    return ToyTrainConfig(
        model=ModelConfig("toy_colours"),
        optim=OptimConfig(**{"epochs": 3, "warmup_epochs": 1, "lr_batch": 0, "lr": 0.05, "ema_decay": 0.5} | optim),
        trainer=TrainerConfig(accelerator="cpu", accumulate=2, progress=False),
        run=str(run),
    )
