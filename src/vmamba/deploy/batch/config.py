"""Settings of the command `batch`: free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class BatchConfig:
    """Use a model on many images, on all cores and GPUs of a machine or a Ray cluster."""

    output: str
    """Folder for the results, Parquet files; or an address such as s3://bucket/folder. A job that was stopped goes on
    where it was when the same command is given again."""
    checkpoint: str | None = None
    """File with the weights; null, with no pretrained name either, for the model of the newest run."""
    pretrained: str | None = None
    """Instead of a file: the variant whose published weights to take."""
    ema: bool = False
    """Of a checkpoint that holds both, take the averaged weights."""
    task: Literal["classification", "segmentation", "detection", "features"] | None = None
    """What to compute; null for what the model was trained for. features, of any classifier or backbone, are what its
    classes are told apart by: one vector an image."""
    topk: int = 5
    """For classification: how many classes to write for each image."""
    threshold: float = 0.3
    """For detection: objects with a lower score are left out."""
    window: int | None = None
    """For segmentation and detection: side of the overlapping squares, in pixels, that large pictures are taken apart
    into, at their own size; null to fit whole pictures into what the model was tested at."""
    img_size: int | tuple[int, int] | None = None
    """Side, or height and width, that the network sees, or for segmentation and detection the short side, or the short
    and the long one; null for the size it was trained at."""
    batch_size: int | None = None
    """Images in one forward pass, at most; null for 32, or for segmentation and detection 8 on a GPU and 1 on the CPU,
    where more are no faster. Of those, pictures go together that the network sees at the same size, without windows."""
    column: str | None = None
    """Of Parquet sources: the column that holds images, as bytes or as paths; null to find it."""
    part_size: int | None = None
    """Images in one file of results, which is also what is computed again at most, by each worker, after a job was
    killed; null for 1024, or 128 for segmentation and detection, and less where there are few images."""
    address: str | None = None
    """Of a Ray cluster to join, "HOST:PORT", or auto for the one that this machine belongs to; null to use this machine
    alone."""
    actors: int | None = None
    """Workers, at most; null for as many as the machine or the cluster has room for."""
    cpus: int | None = None
    """Cores of each worker; null for one, or with GPUs for an equal share, up to eight."""
    gpus: float | None = None
    """GPUs of each worker, or a share of one such as 0.5; null for one where there are any, else none."""
    overwrite: bool = False
    """Begin anew: delete the results of another job in the same folder, or of this one if it is finished, as soon as
    there is something to do and a worker's place to do it. A job that was stopped goes on all the same."""
