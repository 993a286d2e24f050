"""A Ray cluster for the time of a job: one that is there, or one of this machine alone that nobody else can talk to."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vmamba.errors import BatchError, in_one_line, needing

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
_LONGEST = 25  # of a temporary folder's path: Ray's sockets lie deep inside it, and may have 107 characters
_PREFIX = "vmamba_"  # of the folders in it
_LOCK = "in_use"  # a file in each that is locked for as long as the folder is used


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
    if address == "auto":  # Ray itself would look there as well, and join in whatever way it says
        address = os.environ.get("RAY_ADDRESS") or address
    if address is not None and address.startswith("ray://"):
        raise BatchError(
            f"{address} is a door for clients outside of a cluster; give the address of its head, HOST:PORT, or start "
            "this command on a machine of the cluster with --address auto, for instance by `ray job submit`"
        )
    os.environ.update(_ALWAYS)
    if address is None:
        for name, value in {**_ALONE, "RAY_AUTH_TOKEN": secrets.token_hex(16)}.items():
            os.environ.setdefault(name, value)
    with needing("scale", "many images need one more package"):
        import ray
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    with ExitStack() as stack:
        if address is None:
            quiet |= {
                "num_cpus": cores or usable_cores(), "include_dashboard": False,
                "_temp_dir": stack.enter_context(_temporary_folder()), "object_store_memory": _STORE + weights,
            }  # fmt: skip
        stack.callback(ray.shutdown)
        try:
            ray.init(address=address or "local", **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            which = "a Ray cluster cannot be started here" if address is None else f"no Ray cluster at {address!r}"
            raise BatchError(f"{which}: {in_one_line(error)}") from error
        yield ray


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """A place for Ray's sockets and notes; those that jobs left behind when they were killed are cleared away."""
    place = Path(tempfile.gettempdir())
    if len(str(place)) > _LONGEST:
        place = Path("/tmp")
    for lock in place.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            if not hasattr(os, "getuid") or lock.parent.lstat().st_uid == os.getuid():
                with FileLock(lock, timeout=0):
                    shutil.rmtree(lock.parent, ignore_errors=True)
        except (Timeout, OSError):  # in use, or gone in the meantime
            continue
    made = tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=place)
    folder = str(place / Path(made).name[1:])
    try:
        with FileLock(os.path.join(made, _LOCK)):
            os.rename(made, folder)  # under this name others look whether it is locked
            yield os.path.join(folder, "r")  # Ray lets everybody write to its folder, but nobody gets there
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
