"""From a trained model to where it is used. Each part is imported when it is used."""

from typing import TYPE_CHECKING

from vmamba import lazy

if TYPE_CHECKING:
    from vmamba.deploy.aoti import export_aoti
    from vmamba.deploy.export import Exported, export_onnx, export_torch
    from vmamba.deploy.quantize import Quantized, load_quantized, quantize

__all__ = ["Exported", "Quantized", "export_aoti", "export_onnx", "export_torch", "load_quantized", "quantize"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {
            "vmamba.deploy.aoti": ["export_aoti"],
            "vmamba.deploy.export": ["Exported", "export_onnx", "export_torch"],
            "vmamba.deploy.quantize": ["Quantized", "load_quantized", "quantize"],
        },
    )
