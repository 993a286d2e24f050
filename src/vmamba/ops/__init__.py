"""The mathematics: functions over tensors, with no knowledge of models."""

from vmamba.ops.backends import available_backends, use_backend
from vmamba.ops.routes import PATTERNS, cross_merge, cross_scan, register_pattern, scan_orders
from vmamba.ops.selective_scan import selective_scan
from vmamba.ops.ss2d import ss2d_scan

__all__ = [
    "PATTERNS", "available_backends", "cross_merge", "cross_scan", "register_pattern", "scan_orders", "selective_scan",
    "ss2d_scan", "use_backend",
]  # fmt: skip
