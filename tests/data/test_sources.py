import gzip
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data.folders import make_folder
from PIL import Image

from vmamba.data.config import DataConfig
from vmamba.data.images import find_images
from vmamba.data.loading import EpochLoader, LabelledImages, MemorySamples, Samples
from vmamba.data.sources import check_files, check_same_classes, number_of_classes, open_split
from vmamba.data.transforms import Preprocessing
from vmamba.errors import DataError, ImageError

PRE = Preprocessing((8, 8), crop_pct=1.0)


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


def tar_of(folder, file, **options):
    with tarfile.open(file, "w", **options) as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, path.relative_to(folder), recursive=False)


def read_all(split):
    return [(split.name(i).split(split.where + "/")[1], split.read(i, 3)[1]) for i in range(len(split))]


def test_the_first_level_is_the_class_and_what_systems_leave_behind_is_nothing(tmp_path):
    image = Image.new("RGB", (8, 8))
    root = tmp_path / "data" / "train"
    good = ["cat/a.png", "cat/indoor/b.png", "cat/indoor/dog/c.png", "dog/cat/d.png", "dog/e.PNG", "_other/f.jpg"]
    junk = [
        "cat/._a.png", ".ipynb_checkpoints/a.png", "cat/.ipynb_checkpoints/a.png", "__MACOSX/cat/a.png",
        "dog/@eaDir/e.PNG/thumb.jpg", ".hidden.png", "cat/.DS_Store", "cat/Thumbs.db", "cat/desktop.ini", "notes.txt",
    ]  # fmt: skip
    for name in good + junk:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name in good:
            image.save(root / name)
        else:
            (root / name).write_bytes(b"junk")
    (root / "lost+found").mkdir()
    expected = [
        ("_other/f.jpg", 0), ("cat/a.png", 1), ("cat/indoor/b.png", 1), ("cat/indoor/dog/c.png", 1),
        ("dog/cat/d.png", 2), ("dog/e.PNG", 2),
    ]  # fmt: skip
    folder = open_split(DataConfig(root=str(tmp_path / "data")), True)
    assert (folder.class_names, read_all(folder)) == (["_other", "cat", "dog"], expected)
    check_files(folder, 3)
    assert find_images([root])[0] == [str(root / name) for name, _ in expected]

    tar_of(root, tmp_path / "bare.tar")
    tar_of(root.parent, tmp_path / "wrapped.tar")  # train/CLASS
    tar_of(tmp_path / "data", tmp_path / "other.tar")
    tar_of(tmp_path, tmp_path / "deep.tar")  # data/train/CLASS, beside other .tar files
    with tarfile.open(tmp_path / "dots.tar", "w") as tar:
        tar.add(root, ".")
    with tarfile.open(tmp_path / "mytrain.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(root, "/a/very/" + "long" * 30 + "/name/mytrain")
    for name in ("bare", "wrapped", "other", "dots", "mytrain"):
        split = open_split(DataConfig(root=str(tmp_path / f"{name}.tar"), val_root="x"), True)
        assert (split.class_names, read_all(split)) == (folder.class_names, expected), name
        check_files(split, 3)


def test_one_tar_file_a_class_inside_another(tmp_path):
    config = make_folder(tmp_path)
    for name in ("cat", "dog"):
        tar_of(tmp_path / "train" / name, tmp_path / "train" / f"{name}.tar")
        shutil.rmtree(tmp_path / "train" / name)
    tar_of(tmp_path / "train", tmp_path / "train.tar")
    config = DataConfig(root=str(tmp_path / "train.tar"), val_root="x")
    assert contents(open_split(config, True)) == EXPECTED


def test_tar_files_are_found_by_the_name_of_their_split(tmp_path):
    make_folder(tmp_path)
    for split, name in (("train", "train"), ("val", "validation")):
        tar_of(tmp_path / split, tmp_path / f"{name}.tar")
        shutil.rmtree(tmp_path / split)
    config = DataConfig(root=str(tmp_path))
    assert contents(open_split(config, True)) == contents(open_split(config, False)) == EXPECTED
    assert open_split(config, False).where == str(tmp_path / "validation.tar")
    whole = (tmp_path / "train.tar").read_bytes()
    for damaged, reason in (
        (whole[:2000], "damaged or cut off at byte 1536"),  # in the header of cat/1.png
        (whole[:2200], "(unexpected end of data|empty header)"),
        (whole[:1540] + b"x" + whole[1541:], "damaged or cut off at byte 1536"),
        (b"nonsense" * 100, "invalid header"),
        (b"", "empty file"),
    ):
        (tmp_path / "train.tar").write_bytes(damaged)
        with pytest.raises(DataError, match=f"train.tar cannot be read as a .tar file: {reason}"):
            open_split(config, True)


def test_a_class_may_be_called_train(tmp_path):
    make_folder(tmp_path / "data", splits=("val",), classes=("train",))
    tar_of(tmp_path / "data/val", tmp_path / "val.tar")
    split = open_split(DataConfig(root=str(tmp_path / "val.tar"), val_root=str(tmp_path / "val.tar")), False)
    assert split.class_names == ["train"]
    assert len(split) == 3


def test_links_are_followed_and_circles_end(tmp_path):
    config = make_folder(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere/x.png")
    (tmp_path / "train/cow").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train/cat/deep").mkdir()
    (tmp_path / "train/cat/deep/up").symlink_to(tmp_path / "train")
    (tmp_path / "train/cat/deep/self").symlink_to(tmp_path / "train/cat/deep")
    (tmp_path / "train/dog/9.png").symlink_to(tmp_path / "train/dog/0.png")
    split = open_split(config, True)
    names = ["cat/0.png", "cat/1.png", "cat/2.png", "cow/x.png", "dog/0.png", "dog/1.png", "dog/2.png", "dog/9.png"]
    assert [name for name, _ in read_all(split)] == names
    assert find_images([tmp_path / "train"]) == ([str(tmp_path / "train" / name) for name in names], [])
    (tmp_path / "train/dog/9.png").unlink()
    (tmp_path / "train/dog/9.png").symlink_to("gone.png")
    with pytest.raises(DataError, match=r"1 of 8 images.*\n.*dog/9.png: no such file"):
        check_files(open_split(config, True), 3)


def test_names_that_are_not_utf_8(tmp_path):
    make_folder(tmp_path)
    cafe = os.fsencode(tmp_path / "train") + b"/caf\xe9"
    os.rename(tmp_path / "train/cat", cafe)
    os.rename(cafe + b"/1.png", cafe + b"/\xff.png")
    with tarfile.open(tmp_path / "names.tar", "w") as tar:
        tar.add(tmp_path / "train", ".")
    for root in ("train", "names.tar"):
        split = open_split(DataConfig(root=str(tmp_path / root), val_root="x"), True)
        assert split.class_names == [r"caf\xe9", "dog"]
        assert [split.read(i, 3)[1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
        assert split.name(2) == rf"{tmp_path}/{root}/caf\xe9/\xff.png"
        known = open_split(DataConfig(root=str(tmp_path / root), val_root="x"), True, ["dog", r"caf\xe9"])
        assert known.labels() == [1, 1, 1, 0, 0, 0]
    with open(cafe + b"/\xff.png", "wb"):
        pass
    with pytest.raises(DataError, match=r"caf\\xe9/\\xff.png: the file is empty"):
        check_files(open_split(DataConfig(root=str(tmp_path)), True), 3)


def test_one_class_cannot_be_learned_but_can_be_judged(tmp_path):
    config = make_folder(tmp_path, classes=("cat",))
    with pytest.raises(DataError, match=r"train has one class \(cat\): there is nothing to tell apart"):
        open_split(config, True)
    split = open_split(config, False, class_names=["ant", "cat", "dog"])
    assert split.labels() == [1, 1, 1]
    assert number_of_classes(config, split) == 3
    assert len(open_split(DataConfig(root=str(tmp_path), num_classes=5), True)) == 3


def test_channels_that_image_files_do_not_have(tmp_path):
    config = make_folder(tmp_path)
    config.in_chans = 4
    with pytest.raises(DataError, match=r"in_chans is 4; image files are read with 1 \(grey\) or 3 \(RGB\)"):
        open_split(config, True)


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
    split.source.targets[4] = 5
    with pytest.raises(DataError, match=r"dog/1.png has label 5, outside of 0 to 1"):
        number_of_classes(config, split)
    with pytest.raises(DataError, match=r"dog/1.png has label 5; there are 2 classes"):
        LabelledImages(split, PRE.eval_transform(), 3, 2)[4]


def test_bad_files_are_listed_and_named(tmp_path):
    config = make_folder(tmp_path)
    (tmp_path / "train/cat/1.png").write_bytes(b"")
    (tmp_path / "train/dog/2.png").write_bytes(b"nonsense")
    split = open_split(config, True)
    with pytest.raises(DataError, match=r"(?s)2 of 6 images.*cat/1.png: the file is empty.*dog/2.png: not an image"):
        check_files(split, 3)
    check_files(open_split(config, False), 3)
    loader = EpochLoader(Samples(LabelledImages(split, PRE.eval_transform(), 3, 2)), 2, training=False, workers=1)
    with pytest.raises(ImageError, match=r"cat/1.png: the file is empty"):
        list(loader)


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
    cut = Preprocessing((28, 28), 1, (0.286,), (0.353,), crop_pct=0.875)  # the images are resized, then cropped
    assert torch.equal(MemorySamples(train, cut, 10).images[13], cut.eval_transform()(image))
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

    monkeypatch.setattr("vmamba.data.sources.os.replace", read_only)
    with pytest.raises(DataError, match=r"cannot be written.*data.root"):
        open_split(config, True)


def test_data_sets_of_torchvision_in_another_folder(tmp_path, monkeypatch):
    """The folder's own parts, or the one around it, are what people give."""
    config = make_fashion_mnist(tmp_path / "data")
    for wrong in ("data/FashionMNIST", "data/FashionMNIST/raw", "."):
        monkeypatch.chdir(tmp_path)
        message = f"no {wrong}/FashionMNIST/raw; give data, which holds FashionMNIST/raw, instead of {wrong}$"
        with pytest.raises(DataError, match=message):
            open_split(replace(config, root=wrong), True)
        with pytest.raises(DataError, match=rf"give {tmp_path}/data, which holds"):
            open_split(replace(config, root=str(tmp_path / wrong)), False)
    monkeypatch.chdir(tmp_path / "data/FashionMNIST")
    with pytest.raises(DataError, match=r"give \.\., which holds FashionMNIST/raw, instead of \.$"):
        open_split(replace(config, root="."), True)
    message = r"no \./cifar-10-batches-py; give the folder that holds cifar-10-batches-py\. .*data.download"
    with pytest.raises(DataError, match=message):
        open_split(replace(config, root=".", dataset="torch/cifar10"), True)
    with pytest.raises(DataError, match=r"Unknown torchvision dataset fashionmnist; there are .*torch/fashion_mnist"):
        open_split(replace(config, root="..", dataset="torch/fashionmnist"), True)
    for file in Path("raw").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"cannot be opened: Dataset not found"):
        open_split(replace(config, root=".."), True)


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
