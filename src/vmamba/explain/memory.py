"""How much memory a forward pass takes: on the CPU in a process of its own, on a GPU by torch's own count."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys

import torch
from torch import nn

from vmamba.ops.backends import choose_backend


def can_measure(device: torch.device) -> bool:
    """Whether `peak_memory` can tell what a model on this device needs."""
    return device.type == "cuda" or (device.type == "cpu" and sys.platform == "linux")


def peak_memory(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes that one forward pass needs at its peak, beyond the weights.

    On the CPU the model is sent to a fresh process, which runs it once: what this process has allocated and given back
    before does not count there, nor does the code that is read from the disk meanwhile. Linux only.

    Args:
        model: in evaluation mode, on the device where it is to be measured.
        shape: of the images, (B, C, H, W).

    Raises:
        ValueError: the model cannot be sent to another process.
        RuntimeError: it fails there; the message is the other process's last words.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        return _on_gpu(model, torch.randn(shape, device=device))
    sent = io.BytesIO()
    try:
        torch.save(model, sent)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be sent to a process of its own, where memory is measured ({error}):"
            " define its class in a module, name a model instead, or measure without memory"
        ) from error
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "VMAMBA_BACKEND": choose_backend(None, device).name,
    }
    command = [sys.executable, "-c", "from vmamba.explain import memory; memory.measure()"]
    command += [str(torch.get_num_threads()), *map(str, shape)]
    done = subprocess.run(command, env=environment, input=sent.getvalue(), capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise RuntimeError(f"measuring the memory of {type(model).__name__} failed: {said}")
    return int(done.stdout.splitlines()[-1])


@torch.inference_mode()
def _on_gpu(model: nn.Module, images: torch.Tensor) -> int:
    model(images)  # libraries allocate their workspaces once
    torch.cuda.synchronize(images.device)
    before = torch.cuda.memory_allocated(images.device)
    torch.cuda.reset_peak_memory_stats(images.device)
    model(images)
    torch.cuda.synchronize(images.device)
    return torch.cuda.max_memory_allocated(images.device) - before


@torch.inference_mode()
def measure() -> None:
    """What the other process does: run the model once, and print the bytes that this added at its peak."""
    threads, *shape = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    # From the process that started this one: no file, in which somebody else might have put a pickle, is between them.
    model = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
    images = torch.randn(shape)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak of loading
    resident, files = _resident("VmRSS"), _resident("RssFile")
    model(images)
    peak, code = _resident("VmHWM"), _resident("RssFile") - files
    print(max(peak - resident - code, 0))


def _resident(field: str) -> int:
    """Bytes of this process in memory: now, of files alone, or at the most so far."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))
