import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval

from vmamba.data import config
from vmamba.data.config import AugmentConfig
from vmamba.data.seeding import derive_seed, seed_sample, seed_step
from vmamba.data.transforms import BatchAugment, Preprocessing, crop_and_flip, train_transform
from vmamba.models import limits


def test_normalise_is_timms():
    pre = Preprocessing()
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).to(torch.uint8)
    mean, std = torch.tensor(pre.mean), torch.tensor(pre.std)
    expected = ((images / 255).movedim(1, -1) - mean) / std
    torch.testing.assert_close(pre.normalise(images).movedim(1, -1), expected, atol=1e-5, rtol=1e-5)


def test_eval_transform_resizes_the_short_side_and_crops_the_centre():
    image = Image.new("RGB", (200, 100))
    image.paste((255, 0, 0), (70, 0, 130, 100))
    pixels = Preprocessing(img_size=(50, 50), crop_pct=0.5).eval_transform()(image)
    assert pixels.shape == (3, 50, 50)
    assert pixels.dtype == torch.uint8
    assert pixels[:, 25, 25].tolist() == [255, 0, 0]
    assert pixels[0].float().mean() == 255  # the centre 50 of 200 pixels lies inside the red band


def test_eval_transform_leaves_an_image_of_the_right_size_alone():
    pixels = torch.randint(0, 256, (28, 28), dtype=torch.uint8)
    pre = Preprocessing((28, 28), 1, (0.5,), (0.5,), crop_pct=1.0)
    assert torch.equal(pre.eval_transform()(Image.fromarray(pixels.numpy()))[0], pixels)


@pytest.mark.parametrize("pre", [
    Preprocessing((32, 32)),
    Preprocessing((31, 31), interpolation="bilinear", crop_pct=1.0),
    Preprocessing((24, 40), crop_pct=0.9),
])  # fmt: skip
@pytest.mark.parametrize("short", [1, 7, 32, 101])
def test_eval_transform_is_timms_also_of_what_is_long(pre, short):
    draw = np.random.default_rng(0)
    expected = transforms_imagenet_eval(
        pre.img_size, crop_pct=pre.crop_pct, interpolation=pre.interpolation, normalize=False
    )
    transform = pickle.loads(pickle.dumps(pre.eval_transform()))  # loaders send it to their workers
    for ratio, most in ((1, 0), (3.3, 0), (11, 0), (19.9, 0), (30, 8), (45.7, 8)):
        sides = short, round(short * ratio)
        for height, width in (sides, sides[::-1]):
            if most:  # which is moved by up to a pixel, for its new size is rounded
                rows, columns = np.indices((height, width)) / max(height, width)
                values = 127 * np.sin(40 * (rows - columns))[..., None] + 128
                image = Image.fromarray(values.astype(np.uint8).repeat(3, 2))
            else:
                image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
            found, wanted = transform(image), expected(image)
            assert found.shape == wanted.shape == (3, *pre.img_size)
            assert (found.int() - wanted.int()).abs().max() <= most
    assert transform(Image.new("L", (200, 2), 7)).tolist() == torch.full((1, *pre.img_size), 7).tolist()


def test_files_may_say_of_pictures_what_pictures_can_be_prepared_by():
    assert limits.INTERPOLATIONS == config.INTERPOLATIONS
    assert limits.CROP_MODES == config.CROP_MODES


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_timms_other_crops(mode):
    pre = Preprocessing.from_dict({"input_size": (3, 32, 24), "crop_pct": 0.9, "crop_mode": mode})
    expected = transforms_imagenet_eval(
        (32, 24), crop_pct=0.9, crop_mode=mode, interpolation="bicubic", normalize=False
    )
    for size in ((300, 100), (40, 90)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        assert torch.equal(pre.eval_transform()(image), expected(image))
    assert Preprocessing.from_dict(pre.to_dict()) == pre
    with pytest.raises(ValueError, match="crop_mode is 'middle'; expected one of center, squash, border"):
        Preprocessing(crop_mode="middle")


@pytest.mark.parametrize("size", [(2500, 1), (1, 65000)])
def test_a_long_picture_takes_little_memory(size, monkeypatch):
    resize, pixels = Image.Image.resize, []

    def watched(image, size, *args, **options):
        pixels.append(size[0] * size[1])
        return resize(image, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert Preprocessing().eval_transform()(Image.new("RGB", size, (1, 2, 3)))[:, 0, 0].tolist() == [1, 2, 3]
    assert 0 < max(pixels) <= 30 * 256**2


def test_preprocessing_survives_metadata_and_refuses_nonsense():
    pre = Preprocessing((32, 48), 1, (0.3,), (0.2,), "bilinear", 0.9)
    assert Preprocessing.from_dict(pre.to_dict()) == pre
    assert Preprocessing.from_dict({"input_size": (3, 64, 64)}).img_size == (64, 64)
    with pytest.raises(ValueError, match=r"mean has 3 value.*1 channel"):
        Preprocessing(in_chans=1)


def test_crop_and_flip_moves_whole_images():
    images = torch.randint(1, 256, (64, 2, 6, 5), dtype=torch.uint8)
    assert torch.equal(crop_and_flip(images, 0, 0.0), images)
    assert torch.equal(crop_and_flip(images, 0, 1.0), images.flip(3))
    torch.manual_seed(0)
    moved = crop_and_flip(images, 1, 0.0)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    places = set()
    for before, after in zip(padded, moved, strict=True):
        fits = [(y, x) for y in range(3) for x in range(3) if torch.equal(before[:, y : y + 6, x : x + 5], after)]
        assert len(fits) == 1
        places.update(fits)
    assert len(places) == 9  # all of them occur among 64


def test_batch_augment_crops_only_what_comes_from_memory():
    config, pre = AugmentConfig(hflip=1.0, crop_padding=0, random_erasing=0), Preprocessing()
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(BatchAugment(config, pre, in_memory=False)(images), pre.normalise(images))
    assert torch.equal(BatchAugment(config, pre, in_memory=True)(images), pre.normalise(images.flip(3)))
    config = AugmentConfig(hflip=0, crop_padding=2, random_erasing=0)
    assert torch.equal(BatchAugment(config, pre, in_memory=False)(images), pre.normalise(images))
    assert not torch.equal(BatchAugment(config, pre, in_memory=True)(images), pre.normalise(images))
    erased = BatchAugment(AugmentConfig(random_erasing=1.0), pre, in_memory=False)(images)
    assert ((erased != pre.normalise(images)).flatten(1).float().mean(1) > 0).all()


@pytest.mark.parametrize("in_chans", [1, 3])
def test_published_augmentation_runs_on_every_draw(in_chans):
    """timm's posterize asks Pillow for 0 bits about once in two hundred images, which Pillow 13 refuses."""
    pre = Preprocessing((16, 16), in_chans, (0.5,) * in_chans, (0.5,) * in_chans)
    transform = train_transform(AugmentConfig(), pre)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    image = image.convert("RGB" if in_chans == 3 else "L")
    seed_sample(0)
    shapes = {tuple(transform(image).shape) for _ in range(600)}
    assert shapes == {(in_chans, 16, 16)}


def test_parts_have_the_shapes_that_the_settings_say():
    """Of a picture whose red and green channels tell the column and row of each pixel, and blue ones take turns."""
    rows, columns = np.indices((200, 200), dtype=np.uint8)
    image = Image.fromarray(np.stack([columns, rows, columns % 2 * 255], 2))
    plain = {"hflip": 0.0, "rand_augment": None, "color_jitter": 0.0, "interpolation": "nearest"}
    config = AugmentConfig(scale=(0.2, 0.25), ratio=(2.0, 2.5), **plain)
    transform = train_transform(config, Preprocessing((100, 100)))
    for seed in range(20):
        seed_sample(seed)
        pixels = transform(image)
        wide, high = (int(pixels[i].max()) - int(pixels[i].min()) + 1 for i in range(2))
        assert 1.9 <= wide / high <= 2.6
        assert 0.18 <= wide * high / 200**2 <= 0.27
        assert pixels[2].unique().tolist() == [0, 255]  # nothing in between: the nearest pixel is taken


def test_seeds_depend_on_every_part_of_the_position():
    positions = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 10), (11, 0)]
    assert len({derive_seed(*position) for position in positions}) == len(positions)
    assert derive_seed(3, 1, 4) == 3927283127

    def draws(seeder):
        seeder()
        return random.random(), np.random.rand(), float(torch.rand(()))

    assert draws(lambda: seed_sample(5)) == draws(lambda: seed_step(5, torch.device("cpu")))
    assert draws(lambda: seed_sample(5)) != draws(lambda: seed_sample(6))
