"""Settings for data and augmentation: plain dataclasses, free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass

STREAMS = ("wds/", "hfids/", "tfds/")  # data sets that can only be read in a row, as timm's factory names them

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")  # as timm names them
CROP_MODES = ("center", "squash", "border")  # likewise


@dataclass
class DataConfig:
    """Where the images come from and how they are fed."""

    root: str | None = None
    """Folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or a .tar file, or what the data set below expects."""
    val_root: str | None = None
    """Folder or .tar file of the validation images, where they are not under root; root then holds the training
    images alone."""
    dataset: str = ""
    """Empty for folders and .tar files; else a name for timm's factory: torch/fashion_mnist, wds/, hfds/NAME,
    hfids/NAME, tfds/NAME. For torch/ the root is the folder around the data set's own, which holds FashionMNIST."""
    train_split: str = "train"
    """Name of the training split, or sub-folder, or for wds/ the shards."""
    val_split: str = "val"
    """Name of the validation split, or sub-folder, or for wds/ the shards and how many images they hold:
    val-{000..004}.tar|5000."""
    download: bool = False
    """Let torch/ and tfds/ data sets download what is missing."""
    num_classes: int | None = None
    """Number of classes, where the data set does not name them (wds/)."""
    class_names: str | None = None
    """Text file with the name of a class on each line, where the data set does not name them (wds/)."""
    num_samples: int | None = None
    """Number of training images, where the data set cannot tell (wds/)."""
    input_key: str | None = None
    """Column or file ending that holds the image (hfds/, wds/)."""
    target_key: str | None = None
    """Column that holds the label (hfds/, wds/)."""
    img_size: int | tuple[int, int] | None = None
    """Side, or height and width, that the network sees; null for what the model is meant for."""
    in_chans: int | None = None
    """1 for grey images, 3 for RGB; null for what the model is meant for."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, on a scale from 0 to 1; null for the model's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; null for the model's."""
    interpolation: str | None = None
    """How validation images are resized: bicubic, bilinear or nearest; null for the model's."""
    crop_pct: float | None = None
    """Validation resizes the short side to img_size / crop_pct and crops the centre; null for the model's."""
    batch_size: int = 128
    """Images on each device in one step."""
    val_batch_size: int | None = None
    """The same for validation; null for batch_size."""
    workers: int = 4
    """Processes on each device that read and augment images; 0 to do it in the training process. Of wds/ no more than
    there are shards for."""
    in_memory: bool = False
    """Decode every image once, at img_size, and keep it as bytes: for small images, where reading would cost more
    than training. Augmentation is then augment.crop_padding and flips, on whole batches."""
    check_files: bool = False
    """Before the first epoch, decode every image and list those that cannot be used."""


@dataclass
class AugmentConfig:
    """How training images are varied. The defaults are those of the published ImageNet results."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that the random resized crop keeps, from and to."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Aspect ratio of that crop, from and to."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's name of a RandAugment, AutoAugment or AugMix policy; null for none."""
    color_jitter: float = 0.4
    """Strength of brightness, contrast and saturation changes; used where rand_augment is null."""
    interpolation: str = "bicubic"
    """How training images are resized: bicubic, bilinear, nearest, or random."""
    crop_padding: int = 0
    """For data held in memory only: pad by so many pixels and crop at random back to size."""
    random_erasing: float = 0.25
    """Probability that a rectangle of the image is replaced by noise."""
    mixup: float = 0.8
    """Alpha of mixup; 0 for none."""
    cutmix: float = 1.0
    """Alpha of cutmix; 0 for none."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed at all."""
    switch_prob: float = 0.5
    """Where both are on: probability that a batch gets cutmix rather than mixup."""
    label_smoothing: float = 0.1
    """Share of the target spread evenly over the classes."""


@dataclass
class SegmentationAugmentConfig:
    """How training pictures are varied for semantic segmentation. The defaults are those published for ADE20K."""

    scale: tuple[int, int] = (2048, 512)
    """Pictures are resized so that the long and the short side fit into these, in pixels ..."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """... times a random factor, from and to."""
    crop: tuple[int, int] = (512, 512)
    """Height and width of the random crop; smaller pictures are filled up."""
    most_of_one_class: float = 0.75
    """Crops of which one class takes a larger share are drawn again, up to ten times."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Vary brightness, contrast, saturation and hue."""


@dataclass
class DetectionAugmentConfig:
    """How training pictures are varied for detection. The defaults are those of the published 1x schedule."""

    short_sides: tuple[int, ...] = (800,)
    """Sides to which the short side is resized, one of them at random: several (480, 512, ... 800) for 3x."""
    longest: int = 1333
    """What the long side may then be at most."""
    crop_sides: tuple[int, ...] = ()
    """Where given, half of the pictures are first resized to one of these short sides, (400, 500, 600) for 3x, and a
    random part of them is cut out, which is then resized as above."""
    crop: tuple[int, int] = (384, 600)
    """Least and greatest side of that part."""
    jitter: tuple[float, float] | None = None
    """Large-scale jitter instead: factors from and to, (0.1, 2.0), by which a picture that fits into the square of
    jitter_size is resized before it is cropped to that square."""
    jitter_size: int = 1024
    """Side of that square."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = False
    """Vary brightness, contrast, saturation and hue."""
