"""A Ray cluster for the time of a job: one that is there, or one of this machine alone that nobody else can talk to."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vmamba.errors import BatchError

# Set before Ray is imported. Ray sends statistics of use to its makers unless it is told not to. Its services listen on
# every network of the machine unless it is told that there is no cluster (the variable is named after the two systems
# where that is the default); and whoever can talk to them can run code, which only a secret prevents on a machine that
# several people share.
_ALWAYS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",  # else workers give way to every other program, as `vmamba predict` does not
}  # fmt: skip

_STORE = 128 << 20  # bytes of shared memory beside the weights
_LONGEST = 40  # of a temporary folder's path: Ray's sockets lie deep inside it, and may have 107 characters


@contextmanager
def cluster(address: str | None, cores: int | None = None, weights: int = 0) -> Iterator[Any]:
    """Ray, connected. A connection that is there already is used and stays.

    Args:
        address: of a cluster to join; None for one of this machine's own, which ends with the block.
        cores: of that; None for those that this process may use.
        weights: bytes of what will be put into its shared memory.

    Raises:
        BatchError: it cannot be joined or started.
        ImportError: Ray is missing.
    """
    if address is not None and address.startswith("ray://"):
        raise BatchError(
            f"{address} is a door for clients outside of a cluster; give the address of its head, HOST:PORT, or start "
            "this command on a machine of the cluster with --address auto, for instance by `ray job submit`"
        )
    os.environ.update(_ALWAYS)
    if address is None:
        for name, value in {**_ALONE, "RAY_AUTH_TOKEN": secrets.token_hex(16)}.items():
            os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ImportError(f'many images need one more package ({error}): pip install "vmamba[scale]"') from error
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    folder = None
    try:
        if address is None:
            folder = tempfile.mkdtemp(prefix="vmamba", dir=None if len(tempfile.gettempdir()) < _LONGEST else "/tmp")
            quiet |= {
                "num_cpus": cores or usable_cores(), "include_dashboard": False, "_temp_dir": folder,
                "object_store_memory": _STORE + weights,
            }  # fmt: skip
        try:
            ray.init(address=address or "local", **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            which = "a Ray cluster cannot be started here" if address is None else f"no Ray cluster at {address!r}"
            raise BatchError(f"{which}: {' '.join(str(error).split()) or type(error).__name__}") from error
        yield ray
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
