"""Pictures of coloured shapes with boxes and masks, as a COCO data set small enough to train on in seconds."""

import json

import numpy as np
from PIL import Image, ImageDraw

from vmamba.data.config import DetectionAugmentConfig
from vmamba.tasks.detection_recipe import DetectionDataConfig, DetectionTrainConfig
from vmamba.tasks.recipe import ModelConfig, OptimConfig, TrainerConfig

CLASSES = ("disc", "square")
KWARGS = {"backbone": "vmamba_femto_s2", "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "channels": 16, "hidden": 32}


def make_shapes(root, train=8, val=4, masks=True, size=(64, 80), seed=0):
    """root/train.json, root/val.json and root/images: one to three shapes a picture, of category ids 3 and 8."""
    generator = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True, exist_ok=True)
    height, width = size
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        for number in range(count):
            image = Image.fromarray(generator.integers(0, 90, (height, width, 3), dtype=np.uint8))
            draw = ImageDraw.Draw(image)
            for place in range(number % 3 + 1):
                side = int(generator.integers(16, 24))
                x, y = int(generator.integers(place * 26, place * 26 + 3)), int(generator.integers(0, height - side))
                kind = int(generator.integers(2))
                box, colour = (x, y, x + side - 1, y + side - 1), (240, 60, 60) if kind else (60, 220, 240)
                (draw.rectangle if kind else draw.ellipse)(box, fill=colour)
                angles = np.linspace(0, 2 * np.pi, 4 if kind else 24, endpoint=False) + (np.pi / 4 if kind else 0)
                radius = side / 2 * (2**0.5 if kind else 1)
                outline = np.stack([x + side / 2 + radius * np.cos(angles), y + side / 2 + radius * np.sin(angles)], 1)
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number + 1, "category_id": (3, 8)[kind], "iscrowd": 0,
                    "bbox": [x, y, side, side], "area": side * side,
                    **({"segmentation": [outline.clip(0).ravel().tolist()]} if masks else {}),
                })  # fmt: skip
            name = f"{split}{number}.png"
            image.save(root / "images" / name)
            images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        categories = [{"id": 3, "name": "disc"}, {"id": 8, "name": "square"}]
        (root / f"{split}.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
    return root


def shape_recipe(data, run, **optim):
    """Every source of randomness is on: shuffling, several sizes, flips, colours, drop path, sampled regions."""
    return DetectionTrainConfig(
        model=ModelConfig("maskrcnn", kwargs=KWARGS, drop_path_rate=0.1),
        data=DetectionDataConfig(root=str(data), img_size=(64, 96), batch_size=2, workers=0),
        augment=DetectionAugmentConfig(short_sides=(56, 64, 72), longest=120, photometric=True),
        optim=OptimConfig(**{"epochs": 3, "warmup_epochs": 1, "lr_batch": 0, "lr": 3e-3, "ema_decay": 0.9} | optim),
        trainer=TrainerConfig(accelerator="cpu", progress=False),
        run=str(run),
    )
