"""VMamba: visual state space models that install, run and train anywhere.

Importing this imports neither torch nor timm: a name is imported when it is first used. The models are registered with
timm when timm is imported, whichever of the two comes first.
"""

from typing import TYPE_CHECKING

from vmamba import lazy

if TYPE_CHECKING:
    from vmamba.models.checkpoints import identify_checkpoint, load_checkpoint
    from vmamba.models.registry import create_model, list_models
    from vmamba.models.vmamba import VMamba
    from vmamba.ops import (
        available_backends,
        cross_merge,
        cross_scan,
        register_pattern,
        scan_orders,
        selective_scan,
        ss2d_scan,
        use_backend,
    )

__version__ = "0.1.0"

__all__ = [
    "VMamba",
    "available_backends",
    "create_model",
    "cross_merge",
    "cross_scan",
    "identify_checkpoint",
    "list_models",
    "load_checkpoint",
    "register_pattern",
    "scan_orders",
    "selective_scan",
    "ss2d_scan",
    "use_backend",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__, __dir__ = lazy.attributes(
        __name__,
        {
            "vmamba.models.checkpoints": ["identify_checkpoint", "load_checkpoint"],
            "vmamba.models.registry": ["create_model", "list_models"],
            "vmamba.models.vmamba": ["VMamba"],
            "vmamba.ops": [
                "available_backends", "cross_merge", "cross_scan", "register_pattern", "scan_orders", "selective_scan",
                "ss2d_scan", "use_backend",
            ],
        },
        modules=["data", "deploy", "errors", "explain", "files", "models", "nn", "ops", "tasks"],
    )  # fmt: skip
lazy.import_after("timm", "vmamba.models")
