"""Settings of the command `export`: free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ExportConfig:
    """Write a model as a file that other programs run."""

    output: str
    """The file to write."""
    format: Literal["onnx", "torch", "aoti"] = "onnx"
    """onnx, for ONNX Runtime, OpenVINO and others; torch, a torch.export program, which needs torch alone; or aoti, a
    package compiled for this kind of processor, which C++ runs without Python."""
    pretrained: bool = True
    """Of a model given by name, take the published weights; false for random ones, to measure speed."""
    half: bool = False
    """ONNX: weights and layers in float16, of half the size; inputs, outputs, the scans and what detection does between
    and behind its heads stay float32."""
    embed: bool = False
    """ONNX and aoti: put the normalisation before the network and the decision behind it: uint8 pictures in, labels
    out."""
    sizes: Literal["open", "batch"] = "open"
    """open: any batch, height and width; batch: any batch of the size the model is meant for, for networks that take no
    other, such as timm's Swin."""
    tolerance: float | None = None
    """Largest difference from the model that is accepted, as a share of its largest output; null for 1e-4, or 2e-2 in
    half precision. For detection, the share of detections that may have no counterpart; null for 2e-2, or 0.1 in
    half precision."""


@dataclass
class QuantizeConfig:
    """Write a model in int8, calibrated on images."""

    output: str
    """The file to write."""
    data: str
    """Images like those that the model will meet: a folder, whose training split is taken if it has one, searched for
    images at any depth, with classes or without; or a .tar file of class folders, or what the data set below
    expects."""
    dataset: str = ""
    """Empty for folders and .tar files; else a name for timm's factory: torch/fashion_mnist, hfds/NAME, ... For torch/
    the data are the folder around the data set's own, which holds FashionMNIST."""
    format: Literal["onnx", "torch"] = "onnx"
    """onnx, for ONNX Runtime, OpenVINO and others; or torch, a program for torch, torchao and this package."""
    samples: int = 128
    """Images to calibrate with, at most, drawn from all that there are."""
    held_back: int = 128
    """Other images, at most, to compare the written file with the float32 model; of few images, a quarter."""
    embed: bool = False
    """ONNX: put the normalisation before the network and the decision behind it: uint8 pictures in, labels out."""
    sizes: Literal["open", "batch"] = "open"
    """open: any batch, height and width; batch: any batch of the size the model is meant for, for networks that take no
    other, such as timm's Swin."""
    reduce_range: bool | None = None
    """Weights of 7 bits, for x86 processors without VNNI; null for what this processor needs."""
    tolerance: float = 0.1
    """Largest difference from the float32 model that is accepted: root mean square, as a share of the outputs', or for
    detection the share of what is found, by score, that differs."""


@dataclass
class ShareConfig:
    """Write a model to a folder for others, and upload it."""

    output: str
    """The folder to write: config.json, model.safetensors and README.md, the model's card."""
    license: str | None = None
    """What others may do with the weights, as the hub abbreviates it: mit, apache-2.0, cc-by-4.0, other, ..."""
    data: str | None = None
    """What the training images are called; null for what the run's recipe calls them, a folder by its name."""
    rgb: bool = False
    """Of a classifier of grey pictures, write one that takes RGB and sees its grey values, as transformers' pipelines
    need it."""
    push: str | None = None
    """OWNER/NAME on the Hugging Face Hub to upload the folder to; null to upload nothing."""
    private: bool | None = None
    """Whether a repository that is made for that is seen by you alone; null for what your account says."""
