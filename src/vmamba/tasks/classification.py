"""Image classification: what is special to it. What all tasks share is in `task` and `training`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import timm
import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from typing_extensions import override

from vmamba.data.config import DataConfig
from vmamba.data.loading import EpochLoader, LabelledImages, MemorySamples, Samples, Stream, stream_workers
from vmamba.data.sources import PADDING, Split, check_files, check_same_classes, number_of_classes, open_split
from vmamba.data.transforms import BatchAugment, Preprocessing, train_transform
from vmamba.errors import DataError
from vmamba.tasks import pictures
from vmamba.tasks.prediction import Classifier, Weights, class_names, preprocessing_of
from vmamba.tasks.recipe import TrainConfig, ValidateConfig
from vmamba.tasks.runs import MATRIX, PREDICTIONS, report
from vmamba.tasks.task import Means, Score, Task, build_model, rounded
from vmamba.tasks.training import is_first_process


class ClassificationTask(Task):
    """A classifier, how it learns, and how it is judged.

    Args:
        model: maps float images (B, C, H, W) to logits (B, num_classes).
        num_classes: of the head.
        names: of the classes, where the data set knows them.
        pre: what the network expects of its input.
        data: how images are fed.
        val: the validation split.
        train: the training split; None for a task that is only validated.
        recipe: how the network learns; likewise.
    """

    name = "classification"
    score = Score("top1", "top-1 accuracy")

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        names: list[str] | None,
        pre: Preprocessing,
        data: DataConfig,
        val: Split,
        train: Split | None = None,
        recipe: TrainConfig | None = None,
    ) -> None:
        super().__init__(model, recipe)
        self.num_classes, self.names, self.pre, self.data = num_classes, names, pre, data
        self.splits = val, train  # by whether it is for training
        self.mixup = None
        if recipe is not None:
            augment = recipe.augment
            self.transform = train_transform(augment, pre)
            self.augment = BatchAugment(augment, pre, data.in_memory)
            self.smoothing = augment.label_smoothing
            if augment.mixup or augment.cutmix:
                self.mixup = Mixup(
                    augment.mixup, augment.cutmix, prob=augment.mixup_prob, switch_prob=augment.switch_prob,
                    label_smoothing=augment.label_smoothing, num_classes=num_classes,
                )  # fmt: skip

    @classmethod
    @override
    def from_recipe(cls, recipe: TrainConfig) -> Self:
        data = recipe.data
        train, val = open_split(data, training=True, seed=recipe.seed), open_split(data, training=False)
        check_same_classes(train, val)
        num_classes = number_of_classes(data, train)
        number_of_classes(data, val)
        if data.check_files and is_first_process():
            for split in (train, val):
                check_files(split, in_chans=3, workers=data.workers)
        arguments: dict[str, Any] = {} if data.in_chans is None else {"in_chans": data.in_chans}
        if data.img_size is not None and getattr(timm.get_pretrained_cfg(recipe.model.name), "fixed_input_size", False):
            kwargs = {"img_size": data.img_size} | recipe.model.kwargs
            recipe = replace(recipe, model=replace(recipe.model, kwargs=kwargs))
        model = build_model(recipe.model, recipe.seed, num_classes=num_classes, **arguments)
        pre = preprocessing_of(model, data)
        return cls(model, num_classes, train.class_names, pre, data, val, train, recipe)

    @classmethod
    @override
    def from_weights(cls, config: ValidateConfig, weights: Weights) -> Self:
        data, classifier = config.data, Classifier.from_weights(weights, config.data)
        # Folders are labelled in the order of the classes that the model's file names; published ones name none.
        known = weights.metadata.get("class_names") or None
        names = known if config.pretrained is None and not data.dataset else None
        split = open_split(data, training=False, class_names=names)
        if (number := number_of_classes(data, split)) != classifier.num_classes:
            raise DataError(f"{split.where} has {number} classes, but {classifier.source} has {classifier.num_classes}")
        if known and names is None and number != 1000 and split.class_names not in (None, known):
            raise DataError(f"the classes of {split.where}, {split.class_names}, are not those of {classifier.source}")
        if data.check_files and is_first_process():
            check_files(split, classifier.pre.in_chans, data.workers)
        told = classifier.class_names if known or number == 1000 else split.class_names
        return cls(classifier.model, number, told, classifier.pre, data, split)

    @override
    def loader(self, training: bool) -> EpochLoader:
        split, seed = self.splits[training], self.recipe.seed if self.recipe else 0
        assert split is not None
        transform = self.transform if training else self.pre.eval_transform()
        samples: Dataset[Any]
        workers = self.data.workers
        if split.is_stream:  # opened anew by each process, for streams divide the work when they are opened
            split = open_split(self.data, training, seed=seed)
            workers = stream_workers(split, workers, self.trainer.world_size)
            if workers < self.data.workers and is_first_process():
                report(f"{split.where}: {split.shards} shard(s), so {workers} worker(s) a device read them")
            samples = Stream(split, transform, self.pre.in_chans, self.num_classes, workers)
        elif self.data.in_memory:
            samples = MemorySamples(split, self.pre, self.num_classes)
        else:
            samples = Samples(LabelledImages(split, transform, self.pre.in_chans, self.num_classes), seed)
        batch = self.data.batch_size if training else self.data.val_batch_size or self.data.batch_size
        return EpochLoader(samples, batch, training, workers, seed, **self.place)

    @override
    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of uint8 images (B, C, H, W) and labels (B,): the cross-entropy, of mixed images to mixed labels."""
        images, labels = self.augment(batch[0]), batch[1]
        if self.mixup is not None:  # mixed images have no one class
            images, targets = self.mixup(images, labels)  # (B, num_classes), smoothed
            return F.cross_entropy(self.model(images), targets)
        logits = self.model(images)
        self.trained.add("top1", (logits.detach().argmax(1) == labels).sum(), len(labels))
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    # --- validation

    @override
    def on_validation_epoch_start(self) -> None:
        self.means = Means(self.device)
        if self.detailed:
            self.counts = torch.zeros(self.num_classes**2, dtype=torch.int64, device=self.device)
            self.gallery = pictures.Gallery(len(self.splits[0]), self.trainer.world_size, self.class_names)

    @override
    def judge(self, batch: tuple[Tensor, Tensor]) -> None:
        """uint8 images (B, C, H, W) and labels (B,), -1 where the image only fills up the batch."""
        known = batch[1] != PADDING  # after the network, for not every one takes a batch of no images
        logits = self.network(self.pre.normalise(batch[0])).float()[known]
        images, labels = batch[0][known], batch[1][known]
        best = logits.topk(min(5, self.num_classes)).indices
        right = best == labels[:, None]
        self.means.add("loss", F.cross_entropy(logits, labels, reduction="sum"), len(labels))
        self.means.add("top1", right[:, 0].sum(), len(labels))
        if self.num_classes > 5:
            self.means.add("top5", right.sum(), len(labels))
        if self.detailed:
            self.counts += torch.bincount(labels * self.num_classes + best[:, 0], minlength=len(self.counts))
            self.gallery.add(images, labels, best[:, 0], logits.softmax(1).amax(1))

    @override
    def results(self) -> dict[str, float]:
        if self.detailed:
            matrix = self.trainer.strategy.reduce(self.counts, reduce_op="sum")
            self.matrix = matrix.view(self.num_classes, -1).cpu().numpy()
        return self.means.compute(self.trainer.strategy)

    @override
    def details(self) -> dict[str, Any]:
        totals, right = self.matrix.sum(1), self.matrix.diagonal()
        shares = {n: rounded(r / t) for n, r, t in zip(self.class_names, right, totals, strict=True) if t}
        return {"images": int(totals.sum()), "data": self.splits[0].where, "per_class": shares}

    @override
    def summary(self, results: dict[str, Any]) -> str:
        top5 = f", top-5 {results['top5']:.2%}" if "top5" in results else ""
        return f"{results['images']} images: top-1 {results['top1']:.2%}{top5}, loss {results['loss']:.4f}"

    @override
    def show(self, folder: Path) -> None:
        if self.detailed:
            pictures.predictions(self.gallery.chosen, self.gallery.mistakes, folder / PREDICTIONS)
            pictures.confusion_matrix(self.matrix, self.class_names, folder / MATRIX)

    @property
    def class_names(self) -> list[str]:
        """One a class, whether or not the data set knows it."""
        return class_names(self.names or [], self.model)

    @override
    def metadata(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "class_names": self.names or [], **self.pre.to_dict()}
