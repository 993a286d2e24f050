"""From a trained model to where it is used: ONNX files and torch.export programs. Each is imported when it is used."""

from typing import TYPE_CHECKING

from vmamba import lazy

if TYPE_CHECKING:
    from vmamba.deploy.export import Exported, export_onnx, export_torch

__all__ = ["Exported", "export_onnx", "export_torch"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy.attributes(
        __name__, {"vmamba.deploy.export": ["Exported", "export_onnx", "export_torch"]}
    )
