"""VMamba: visual state space models that install, run and train anywhere."""

from vmamba.models.checkpoints import identify_checkpoint, load_checkpoint
from vmamba.models.vmamba import VMamba, create_model, list_models
from vmamba.ops import available_backends, cross_merge, cross_scan, selective_scan, ss2d_scan, use_backend

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
    "selective_scan",
    "ss2d_scan",
    "use_backend",
]
