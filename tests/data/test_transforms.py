import random

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.data.config import AugmentConfig
from vmamba.data.seeding import derive_seed, seed_sample, seed_step
from vmamba.data.transforms import BatchAugment, Preprocessing, crop_and_flip, train_transform


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


def test_seeds_depend_on_every_part_of_the_position():
    positions = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 10), (11, 0)]
    assert len({derive_seed(*position) for position in positions}) == len(positions)
    assert derive_seed(3, 1, 4) == 3927283127

    def draws(seeder):
        seeder()
        return random.random(), np.random.rand(), float(torch.rand(()))

    assert draws(lambda: seed_sample(5)) == draws(lambda: seed_step(5, torch.device("cpu")))
    assert draws(lambda: seed_sample(5)) != draws(lambda: seed_sample(6))
