"""Settings of the command `export`: free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ExportConfig:
    """Write a model as a file that other programs run."""

    output: str
    """The file to write."""
    format: Literal["onnx", "torch"] = "onnx"
    """onnx, for ONNX Runtime, OpenVINO and others; or torch, a torch.export program, which needs torch alone."""
    pretrained: bool = True
    """Of a model given by name, take the published weights; false for random ones, to measure speed."""
    half: bool = False
    """ONNX: weights and layers in float16, of half the size; the scans' states, inputs and outputs stay float32."""
    embed: bool = False
    """ONNX: put the normalisation before the network and the decision behind it: uint8 pictures in, labels out."""
    sizes: Literal["open", "batch"] = "open"
    """open: any batch, height and width; batch: any batch of the size the model is meant for, for networks that take no
    other, such as timm's Swin."""
    tolerance: float | None = None
    """Largest difference from the model that is accepted, as a share of its largest output; null for 1e-4, or 2e-2 in
    half precision."""
