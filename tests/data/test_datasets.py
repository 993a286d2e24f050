import gzip
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.data.config import DataConfig
from vmamba.data.datasets import (
    EpochLoader,
    MemorySamples,
    Samples,
    Stream,
    TicketSampler,
    check_files,
    check_same_classes,
    number_of_classes,
    open_split,
)
from vmamba.data.transforms import AugmentConfig, Preprocessing, train_transform
from vmamba.errors import DataError, ImageError

PRE = Preprocessing((8, 8), crop_pct=1.0)


def make_folder(root, splits=("train", "val"), classes=("cat", "dog"), each=3):
    """Small images whose colour tells class and number: red = 10·class, green = number."""
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(each):
                Image.new("RGB", (8, 8), (10 * label, number, 0)).save(folder / f"{number}.png")
    return DataConfig(root=str(root))


def contents(split):
    return [(split.read(i, 3)[0].getpixel((0, 0))[:2], split.read(i, 3)[1]) for i in range(len(split))]


EXPECTED = [((10 * label, number), label) for label in (0, 1) for number in range(3)]


def test_a_folder_is_read_in_order_with_its_class_names(tmp_path):
    config = make_folder(tmp_path)
    train, val = open_split(config, True), open_split(config, False)
    assert contents(train) == EXPECTED
    assert contents(val) == EXPECTED
    assert train.class_names == ["cat", "dog"]
    assert number_of_classes(config, train) == 2
    assert train.name(4) == str(tmp_path / "train/dog/1.png")
    check_same_classes(train, val)


def test_every_image_extension_counts(tmp_path):
    config = make_folder(tmp_path)
    for extension in ("webp", "bmp", "tif", "gif", "JPG"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"train/cat/x.{extension}")
    assert len(open_split(config, True)) == 11


@pytest.mark.parametrize("name", ["validation", "test"])
def test_synonyms_of_the_validation_folder(tmp_path, name):
    config = make_folder(tmp_path, splits=("train", name))
    assert open_split(config, False).where == str(tmp_path / name)


def test_two_roots_and_tar_files(tmp_path):
    make_folder(tmp_path)
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name in ("cat", "dog"):
                tar.add(tmp_path / split / name, name)
    folders = DataConfig(root=str(tmp_path / "train"), val_root=str(tmp_path / "val"))
    tars = DataConfig(root=str(tmp_path / "train.tar"), val_root=str(tmp_path / "val.tar"))
    for config in (folders, tars):
        split = open_split(config, False)
        assert contents(split) == EXPECTED
        assert split.class_names == ["cat", "dog"]
    with pytest.raises(DataError, match=r"data.val_root"):
        open_split(DataConfig(root=str(tmp_path / "train.tar")), True)


def test_labels_follow_the_classes_asked_for(tmp_path):
    config = make_folder(tmp_path)
    split = open_split(config, False, class_names=["dog", "cat"])
    assert [label for _, label in contents(split)] == [1, 1, 1, 0, 0, 0]
    with pytest.raises(DataError, match=r"missing: cow; unknown: cat"):
        open_split(config, False, class_names=["cow", "dog"])


def test_what_is_wrong_with_a_folder_is_told_before_any_work(tmp_path):
    def refuses(config, message, training=True):
        with pytest.raises(DataError, match=message):
            open_split(config, training)

    refuses(DataConfig(), "data.root is not set")
    refuses(DataConfig(root=str(tmp_path / "nowhere")), "nowhere: no such folder")
    make_folder(tmp_path / "classes", splits=(".",))
    refuses(DataConfig(root=str(tmp_path / "classes")), r"no folder train or training; it holds cat, dog")
    (tmp_path / "empty/train").mkdir(parents=True)
    refuses(DataConfig(root=str(tmp_path / "empty")), "holds no images")
    config = make_folder(tmp_path / "bare")
    (tmp_path / "bare/train/cow").mkdir()
    refuses(config, "without a single image in .*train: cow")
    config = make_folder(tmp_path / "loose")
    Image.new("L", (4, 4)).save(tmp_path / "loose/train/stray.png")
    refuses(config, r"outside of class folders: stray.png")
    (tmp_path / "file.zip").write_bytes(b"")
    refuses(DataConfig(root=str(tmp_path / "file.zip"), val_root="x"), "not a .tar file")


def test_differing_classes_are_refused(tmp_path):
    config = make_folder(tmp_path)
    os.rename(tmp_path / "val/dog", tmp_path / "val/cow")
    with pytest.raises(DataError, match=r"only in the first: dog; only in the second: cow"):
        check_same_classes(open_split(config, True), open_split(config, False))
    shutil.rmtree(tmp_path / "val/cow")
    with pytest.raises(DataError, match=r"only in the first: dog; only in the second: none"):
        check_same_classes(open_split(config, True), open_split(config, False))


def test_number_of_classes_must_be_known_and_hold_every_label(tmp_path):
    config = make_folder(tmp_path)
    split = open_split(config, True)
    with pytest.raises(DataError, match=r"num_classes is 1, but .* has 2"):
        number_of_classes(DataConfig(num_classes=1), split)
    assert number_of_classes(DataConfig(num_classes=7), split) == 7
    split.source.reader.samples[4] = (split.source.reader.samples[4][0], 5)
    with pytest.raises(DataError, match=r"dog/1.png has label 5, outside of 0 to 1"):
        number_of_classes(config, split)
    with pytest.raises(DataError, match=r"dog/1.png has label 5; there are 2 classes"):
        Samples(split, PRE.eval_transform(), 3, 2)[0, 4]


def test_bad_files_are_listed_and_named(tmp_path):
    config = make_folder(tmp_path)
    (tmp_path / "train/cat/1.png").write_bytes(b"")
    (tmp_path / "train/dog/2.png").write_bytes(b"nonsense")
    split = open_split(config, True)
    with pytest.raises(DataError, match=r"(?s)2 of 6 images.*cat/1.png: the file is empty.*dog/2.png: not an image"):
        check_files(split, 3)
    check_files(open_split(config, False), 3)
    loader = EpochLoader(Samples(split, PRE.eval_transform(), 3, 2), 2, training=False, workers=1)
    with pytest.raises(ImageError, match=r"cat/1.png: the file is empty"):
        list(loader)


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


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_an_epoch_can_be_replayed_whatever_the_number_of_workers(tmp_path):
    config = make_folder(tmp_path, each=8)
    for path in (tmp_path / "train").glob("*/*.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    samples = Samples(open_split(config, True), train_transform(AugmentConfig(), PRE), 3, 2, seed=3)
    loaders = [EpochLoader(samples, 4, True, workers=workers, seed=3) for workers in (0, 2)]
    zero, two = ([epoch_of(loader, epoch) for epoch in (0, 1)] for loader in loaders)
    fresh = epoch_of(EpochLoader(samples, 4, True, seed=3), 1)
    for other in (two[1], fresh):
        assert torch.equal(zero[1][0], other[0])
        assert torch.equal(zero[1][1], other[1])
    assert torch.equal(zero[0][0], two[0][0])
    assert not torch.equal(zero[0][0], zero[1][0])
    other_seed = Samples(samples.split, samples.transform, 3, 2, seed=4)
    assert not torch.equal(epoch_of(EpochLoader(other_seed, 4, True, seed=3), 1)[0], fresh[0])


def test_samples_in_memory_are_those_on_disk(tmp_path):
    config = make_folder(tmp_path)
    split = open_split(config, True)
    memory, disk = MemorySamples(split, PRE, 2), Samples(split, PRE.eval_transform(), 3, 2)
    for batch in (EpochLoader(memory, 4, False), EpochLoader(disk, 4, False)):
        images, labels = epoch_of(batch, 0)
        assert images[:, 0, 0, 0].tolist() == [0, 0, 0, 10, 10, 10]
        assert images[:, 1, 0, 0].tolist() == [0, 1, 2, 0, 1, 2]
        assert images.dtype == torch.uint8
        assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert memory.__getitems__([(0, 1), (0, -1)])[1].tolist() == [0, -1]


def idx(array: np.ndarray) -> bytes:
    """The format of the MNIST family."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def make_fashion_mnist(root, train=20, test=10):
    raw = root / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (raw / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return DataConfig(dataset="torch/fashion_mnist", root=str(root), in_memory=True, img_size=28, in_chans=1)


def test_fashion_mnist_is_unpacked_and_read(tmp_path):
    config = make_fashion_mnist(tmp_path)
    train, val = open_split(config, True), open_split(config, False)
    assert (len(train), len(val), train.class_names[9]) == (20, 10, "Ankle boot")
    pre = Preprocessing((28, 28), 1, (0.286,), (0.353,), crop_pct=1.0)
    memory = MemorySamples(train, pre, 10)
    image, label = train.read(13, 1)
    assert torch.equal(memory.images[13, 0], torch.from_numpy(np.array(image)))
    assert label == 3
    assert sorted(path.name for path in (tmp_path / "FashionMNIST/raw").glob("*ubyte")) == [
        "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "train-images-idx3-ubyte", "train-labels-idx1-ubyte",
    ]  # fmt: skip


def test_fashion_mnist_that_is_damaged_missing_or_read_only(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"cannot be opened.*data.download"):
        open_split(DataConfig(dataset="torch/fashion_mnist", root=str(tmp_path / "no")), True)
    config = make_fashion_mnist(tmp_path)
    packed = tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"end-of-stream"):
        open_split(config, True)
    assert not list(packed.parent.glob("*ubyte")) or not (packed.parent / "train-images-idx3-ubyte").exists()
    packed.write_bytes(whole)

    def read_only(*_):
        raise OSError(30, "Read-only file system", str(packed))

    monkeypatch.setattr("vmamba.data.datasets.os.replace", read_only)
    with pytest.raises(DataError, match=r"cannot be written.*data.root"):
        open_split(config, True)


def test_hugging_face_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    make_folder(tmp_path / "images")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    paths = sorted((tmp_path / "images/train").glob("*/*.png"))
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "label": [int(path.parent.name == "dog") for path in paths],
    }
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "hub/train.parquet")
    config = DataConfig(dataset=f"hfds/{tmp_path}/hub", root=str(tmp_path / "cache"))
    split = open_split(config, True)
    assert split.class_names == ["cat", "dog"]
    assert number_of_classes(config, split) == 2
    assert contents(split) == EXPECTED
    assert "sample 2" in split.name(2)


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

    (tmp_path / "names.txt").write_text("even\nodd\n")
    config.class_names = str(tmp_path / "names.txt")
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
