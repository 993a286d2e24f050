import io
import json
import tarfile

import numpy as np
import pytest
import torch
from data.folders import make_folder
from PIL import Image

from vmamba.data.config import DataConfig
from vmamba.data.loading import (
    EpochLoader,
    LabelledImages,
    MemorySamples,
    Samples,
    Stream,
    TicketSampler,
    stream_workers,
)
from vmamba.data.sources import number_of_classes, open_split
from vmamba.data.transforms import AugmentConfig, Preprocessing, train_transform
from vmamba.errors import DataError

PRE = Preprocessing((8, 8), crop_pct=1.0)


def test_tickets_divide_an_epoch_among_devices():
    shuffled = [list(TicketSampler(11, True, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(part) for part in shuffled] == [5, 5]
    indices = [index for part in shuffled for _, index in part]
    assert len(set(indices)) == 10
    assert set(indices) <= set(range(11))
    ordered = [list(TicketSampler(5, False, rank=rank, world_size=2)) for rank in (0, 1)]
    assert ordered == [[(0, 0), (0, 2), (0, 4)], [(0, 1), (0, 3), (0, -1)]]
    sampler = TicketSampler(50, True)
    first = list(sampler)
    sampler.set_epoch(1)
    assert [epoch for epoch, _ in sampler] == [1] * 50
    assert [index for _, index in sampler] != [index for _, index in first]


def test_batches_are_of_one_group_until_too_few_are_left():
    upright = [number % 3 == 0 for number in range(50)]
    samplers = [TicketSampler(50, True, 1, rank, 2, upright, batch_size=4) for rank in (0, 1)]
    for sampler, plain in zip(samplers, [TicketSampler(50, True, 1, rank, 2) for rank in (0, 1)], strict=True):
        order = [index for _, index in sampler]
        assert sorted(order) == sorted(index for _, index in plain)
        kinds = [{upright[index] for index in order[i : i + 4]} for i in range(0, len(order), 4)]
        assert all(len(kind) == 1 for kind in kinds[:-2])
        assert {True} in kinds
        assert {False} in kinds
        sampler.set_epoch(1)
        assert [index for _, index in sampler] != order
    in_order = TicketSampler(50, False, groups=upright, batch_size=4)
    assert [index for _, index in in_order] == list(range(50))


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_an_epoch_can_be_replayed_whatever_the_number_of_workers(tmp_path):
    config = make_folder(tmp_path, each=8)
    for path in (tmp_path / "train").glob("*/*.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    samples = Samples(LabelledImages(open_split(config, True), train_transform(AugmentConfig(), PRE), 3, 2), seed=3)
    loaders = [EpochLoader(samples, 4, True, workers=workers, seed=3) for workers in (0, 2)]
    zero, two = ([epoch_of(loader, epoch) for epoch in (0, 1)] for loader in loaders)
    fresh = epoch_of(EpochLoader(samples, 4, True, seed=3), 1)
    for other in (two[1], fresh):
        assert torch.equal(zero[1][0], other[0])
        assert torch.equal(zero[1][1], other[1])
    assert torch.equal(zero[0][0], two[0][0])
    assert not torch.equal(zero[0][0], zero[1][0])
    other_seed = Samples(samples.items, seed=4)
    assert not torch.equal(epoch_of(EpochLoader(other_seed, 4, True, seed=3), 1)[0], fresh[0])


def test_samples_in_memory_are_those_on_disk(tmp_path):
    config = make_folder(tmp_path)
    split = open_split(config, True)
    memory, disk = MemorySamples(split, PRE, 2), Samples(LabelledImages(split, PRE.eval_transform(), 3, 2))
    for batch in (EpochLoader(memory, 4, False), EpochLoader(disk, 4, False)):
        images, labels = epoch_of(batch, 0)
        assert images[:, 0, 0, 0].tolist() == [0, 0, 0, 10, 10, 10]
        assert images[:, 1, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]
        assert images.dtype == torch.uint8
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert memory.__getitems__([(0, 1), (0, -1)])[1].tolist() == [0, -1]


def test_what_is_random_in_a_sample_is_drawn_anew_in_every_epoch(tmp_path):
    items = LabelledImages(open_split(make_folder(tmp_path), True), lambda image: torch.rand(4), 3, 2)
    samples = Samples(items, seed=3)
    tickets = (0, 0), (0, 1), (1, 0), (1, 1)
    drawn = [tuple(samples[ticket][0].tolist()) for ticket in tickets]
    assert len(set(drawn)) == 4
    assert [tuple(samples[ticket][0].tolist()) for ticket in tickets] == drawn


def make_shards(folder, shards=4, each=4):
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"part-{shard}.tar", "w") as tar:
            for number in range(each):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (shard, number, 0)).save(buffer, "PNG")
                for ending, data in (("png", buffer.getvalue()), ("cls", str(shard % 2).encode())):
                    entry = tarfile.TarInfo(f"{shard}-{number}.{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    info = {
        "splits": {
            "train": {
                "name": "train",
                "num_samples": shards * each,
                "filenames": [f"part-{s}.tar" for s in range(shards)],
                "shard_lengths": [each] * shards,
            }
        }
    }
    (folder / "info.json").write_text(json.dumps(info))
    return DataConfig(dataset="wds/", root=str(folder), val_split="train", batch_size=4)


def test_shards_are_streamed_and_an_epoch_can_be_replayed(tmp_path):
    pytest.importorskip("webdataset")
    config = make_shards(tmp_path / "shards")
    split = open_split(config, True)
    with pytest.raises(DataError, match=r"set data.num_classes"):
        number_of_classes(config, split)
    with pytest.raises(DataError, match=r"is a stream"):
        MemorySamples(split, PRE, 2)

    config.train_split = config.val_split = "part-{0..3}.tar"
    with pytest.raises(DataError, match=r"the number of its images is not known: set data.num_samples$"):
        open_split(config, True)
    with pytest.raises(DataError, match=r"how many images there are in wds/ \(part.* is not known: .*tar\|5000"):
        open_split(config, False)
    config.val_split += "|16"
    assert len(open_split(config, False)) == 16
    config.train_split = config.val_split = "train"

    config.class_names = str(tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("even\neven\n")
    with pytest.raises(DataError, match=r"several classes are called even"):
        open_split(config, True)
    (tmp_path / "names.txt").write_text("even\nodd\n")
    assert open_split(config, True).class_names == ["even", "odd"]
    assert number_of_classes(config, open_split(config, True)) == 2

    def loader():
        return EpochLoader(Stream(open_split(config, True), PRE.eval_transform(), 3, 2, 1), 4, True, seed=1)

    one, other = loader(), loader()
    first, second = epoch_of(one, 0), epoch_of(one, 1)
    assert len(one) == 4
    assert first[0].shape == (16, 3, 8, 8)
    assert torch.equal(first[1], first[0][:, 0, 0, 0] % 2)
    assert torch.equal(epoch_of(other, 1)[0], second[0])
    assert not torch.equal(first[0], second[0])
    val = EpochLoader(Stream(open_split(config, False), PRE.eval_transform(), 3, 2, 1), 4, False)
    images, _ = epoch_of(val, 0)
    assert sorted(zip(images[:, 0, 0, 0].tolist(), images[:, 1, 0, 0].tolist(), strict=True)) == [
        (shard, number) for shard in range(4) for number in range(4)
    ]
    with pytest.raises(DataError, match=r"has label 1; there are 1 classes"):
        list(EpochLoader(Stream(open_split(config, False), PRE.eval_transform(), 3, 1, 1), 4, False))


def test_a_stream_that_ends_too_early_is_an_error(tmp_path):
    """Each worker needs a shard, and the promised number of images."""
    pytest.importorskip("webdataset")
    config = make_shards(tmp_path / "shards", shards=2, each=6)

    def stream(workers, training=True):
        return Stream(open_split(config, training), PRE.eval_transform(), 3, 2, workers)

    split = open_split(config, True)
    assert split.shards == 2
    assert [stream_workers(split, *of) for of in ((0, 1), (1, 1), (2, 1), (4, 1), (4, 2))] == [1, 1, 2, 2, 1]
    with pytest.raises(DataError, match=r"is 2 shard\(s\), fewer than the 3 devices"):
        stream_workers(split, 1, 3)
    assert len(list(EpochLoader(stream(2), 4, True, 2))) == 4  # a worker fills its last batch up from the start
    with pytest.raises(DataError, match=r"gave 2 of the 3 batches of an epoch: .*lower data.workers"):
        list(EpochLoader(stream(3), 4, True, 3))
    val = EpochLoader(stream(2, False), 4, False, 2)
    batches = [len(labels) for _, labels in val]
    assert sorted(batches) == [2, 2, 4, 4]
    assert len(val) == len(batches)  # and not the 3 that would be enough for one worker: the last would go unseen
