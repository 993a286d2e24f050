"""Folders of small images, as the tests of this folder use them."""

from PIL import Image

from vmamba.data.config import DataConfig


def make_folder(root, splits=("train", "val"), classes=("cat", "dog"), each=3):
    """Small images whose colour tells class and number: red = 10·class, green = number."""
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(each):
                Image.new("RGB", (8, 8), (10 * label, number, 0)).save(folder / f"{number}.png")
    return DataConfig(root=str(root))
