"""From data sets to batches: tickets that say which sample of which epoch, seeds that follow from them, the loader."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from vmamba.data.images import standard_image
from vmamba.data.seeding import derive_seed, seed_sample
from vmamba.data.sources import PADDING, Split, tracked
from vmamba.data.transforms import ImageTransform, Preprocessing
from vmamba.errors import DataError

Ticket = tuple[int, int]  # (epoch, index of the sample): what a sampler hands to a data set


class Items(Protocol):
    """Samples of one split, of any kind: what a task reads, transforms and hands to its batches.

    What is random in one draws from the global generators of Python, NumPy and torch, which `Samples` has seeded.
    Index -1 asks for a filler: a sample like the others that no metric counts.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Samples(Dataset[Any]):
    """Ticket (epoch, index) to a sample of ``items``; what is random in it depends on seed and ticket alone."""

    def __init__(self, items: Items, seed: int = 0) -> None:
        self.items, self.seed = items, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, ticket: Ticket) -> Any:
        epoch, index = ticket
        seed_sample(derive_seed(self.seed, epoch, index))
        return self.items[index]


class TicketSampler(Sampler[Ticket]):
    """The tickets (epoch, index) of one device for one epoch.

    Shuffled for training, where what does not divide by the devices is left out; in order for validation, where every
    device gets equally many, filled up with tickets of index -1.

    Args:
        length: number of samples.
        shuffle: for training.
        seed: of the order.
        rank: of the device among ``world_size``.
        world_size: devices that share the samples.
        groups: of each sample, the group that it belongs to: when shuffled, each ``batch_size`` tickets in a row are of
            one group, until too few of each are left.
        batch_size: see ``groups``.
    """

    def __init__(
        self, length: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1,
        groups: Sequence[Hashable] | None = None, batch_size: int = 1,
    ) -> None:  # fmt: skip
        self.length, self.shuffle, self.seed, self.rank, self.world_size = length, shuffle, seed, rank, world_size
        self.groups, self.batch_size = groups, batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """From the next iteration on, give the tickets of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world_size if self.shuffle else -(-self.length // self.world_size)

    def __iter__(self) -> Iterator[Ticket]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = list(range(self.length)) + [-1] * (len(self) * self.world_size - self.length)
        own = order[self.rank : len(self) * self.world_size : self.world_size]
        if self.shuffle and self.groups is not None:
            own = _grouped(own, self.groups, self.batch_size)
        for index in own:
            yield self.epoch, index


def _grouped(order: list[int], groups: Sequence[Hashable], size: int) -> list[int]:
    """Indices in an order near theirs, in which each `size` in a row are of one group, but for the last of each."""
    grouped: list[int] = []
    waiting: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index in order:
        group = waiting[groups[index]]
        group.append(index)
        if len(group) == size:
            grouped += group
            group.clear()
    return grouped + [index for group in waiting.values() for index in group]


class EpochLoader(DataLoader[Any]):
    """A loader of batches that knows its epoch, and whose epochs can be replayed.

    Args:
        data: `Samples`; or a data set that hands out whole batches of tickets (``__getitems__``), in this process; or a
            stream, an iterable data set with ``set_epoch``.
        batch_size: samples on this device in one step.
        training: shuffle, and leave out the last batch where it is not full.
        workers: processes that make samples; 0 to make them in this one.
        seed: of the order, and of what is random in a stream.
        rank: of this device among ``world_size``.
        world_size: devices that share the samples.
        pin_memory: as in torch's loader.
        collate: a list of samples to a batch; by default torch's, for samples of tensors and numbers of one shape.
        groups: of each sample, the group that its batch is to be of in training.
    """

    def __init__(
        self,
        data: Dataset[Any],
        batch_size: int,
        training: bool,
        workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        collate: Callable[[list[Any]], Any] | None = None,
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        stream, batches = isinstance(data, IterableDataset), hasattr(data, "__getitems__")
        if batches:
            workers, collate = 0, _as_is  # picking rows of a tensor is cheaper than sending them between processes
        if stream:
            workers = max(workers, 1)  # a fresh process starts each epoch's stream from its beginning
        sampler = None if stream else TicketSampler(
            len(data), training, seed, rank, world_size, groups, batch_size  # type: ignore[arg-type]
        )  # fmt: skip
        super().__init__(
            data,
            batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            drop_last=training,
            generator=torch.Generator(),
            pin_memory=pin_memory,
            persistent_workers=workers > 0 and not stream,
        )
        self.seed, self.rank = seed, rank
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """From the next iteration on, give the batches of this epoch."""
        assert self.generator is not None
        self.generator.manual_seed(derive_seed(self.seed, epoch, self.rank))  # gives workers of a stream their seeds
        tickets: Any = self.dataset if isinstance(self.dataset, IterableDataset) else self.sampler
        tickets.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of an epoch; of a stream in validation at most: each worker's last may not be full."""
        number = super().__len__()
        return number if self.drop_last or not isinstance(self.dataset, Stream) else number + self.num_workers - 1

    def __iter__(self) -> Any:
        """The batches of the epoch.

        Raises:
            DataError: in training, a stream has ended before as many as there were to be.
        """
        batches = super().__iter__()
        return self._all(batches) if isinstance(self.dataset, Stream) and self.drop_last else batches

    def _all(self, batches: Iterator[Any]) -> Iterator[Any]:
        assert isinstance(self.dataset, Stream)
        number = 0
        for batch in batches:
            number += 1
            yield batch
        if number < len(self):
            raise DataError(
                f"{self.dataset.split.where} gave {number} of the {len(self)} batches of an epoch: some "
                f"of the {self.num_workers} workers found no part of it left for them, or no image there that can be "
                f"read: lower data.workers"
            )


def _as_is(batch: Any) -> Any:
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# Images with one label each: uint8 (C, H, W) and int


class LabelledImages:
    """Images of a split, transformed, with their labels; `PADDING` is the label of fillers."""

    def __init__(self, split: Split, transform: ImageTransform, in_chans: int, num_classes: int) -> None:
        self.split, self.transform, self.in_chans, self.num_classes = split, transform, in_chans, num_classes

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.split.read(max(index, 0), self.in_chans)
        if not 0 <= label < self.num_classes:
            raise DataError(f"{self.split.name(index)} has label {label}; there are {self.num_classes} classes")
        return self.transform(image), PADDING if index < 0 else label


class MemorySamples(Dataset[tuple[Tensor, Tensor]]):
    """All images of a split, decoded once and kept as uint8 (N, C, H, W); hands out whole batches of tickets."""

    def __init__(self, split: Split, pre: Preprocessing, num_classes: int) -> None:
        if split.is_stream:
            raise DataError(f"data.in_memory needs images that can be read one by one; {split.where} is a stream")
        data, labels = getattr(split.source, "data", None), split.labels()
        as_they_are = pre.in_chans == 1 and pre.crop_pct == 1 and labels is not None
        if as_they_are and isinstance(data, Tensor) and data.shape[1:] == pre.img_size:
            self.images, self.labels = data[:, None], torch.tensor(labels)
            return
        items = LabelledImages(split, pre.eval_transform(), pre.in_chans, num_classes)
        self.images = torch.empty(len(split), pre.in_chans, *pre.img_size, dtype=torch.uint8)
        self.labels = torch.empty(len(split), dtype=torch.int64)
        for index in tracked(range(len(split)), f"reading {split.where}"):
            self.images[index], self.labels[index] = items[index]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, ticket: Ticket) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([ticket])
        return images[0], labels[0]

    def __getitems__(self, tickets: Sequence[Ticket]) -> tuple[Tensor, Tensor]:
        index = torch.tensor([index for _, index in tickets])
        labels = self.labels[index]
        labels[index < 0] = PADDING
        return self.images[index], labels


def stream_workers(split: Split, workers: int, world_size: int = 1) -> int:
    """How many of the workers on each of ``world_size`` devices read a stream: each needs a shard of its own.

    Raises:
        DataError: there are fewer shards than devices.
    """
    if split.shards is None:
        return max(workers, 1)
    if split.shards < world_size:
        raise DataError(
            f"{split.where} is {split.shards} shard(s), fewer than the {world_size} devices, each of which needs one "
            f"of its own: cut it into more .tar files, or use fewer devices"
        )
    return max(min(workers, split.shards // world_size), 1)


class Stream(IterableDataset[tuple[Tensor, int]]):
    """Samples that come in a row, from timm's readers of shards and streams.

    timm shuffles by epoch and shares the work among workers and devices. It skips a sample that cannot be decoded,
    with a warning: such data sets are prepared by a program, and have no files to name.
    """

    def __init__(self, split: Split, transform: ImageTransform, in_chans: int, num_classes: int, workers: int) -> None:
        self.split, self.transform, self.in_chans, self.num_classes = split, transform, in_chans, num_classes
        split.source.set_loader_cfg(num_workers=workers)

    def __len__(self) -> int:
        return len(self.split)

    def set_epoch(self, epoch: int) -> None:
        """From the next iteration on, give the samples of this epoch."""
        self.split.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for image, label in self.split.source:
            if not 0 <= label < self.num_classes:
                raise DataError(f"{self.split.where} has label {label}; there are {self.num_classes} classes")
            yield self.transform(standard_image(image, self.in_chans)), label
