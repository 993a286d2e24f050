"""What every benchmark states beside its numbers: the machine, the versions, the day."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def describe(device: str = "cpu") -> dict[str, str | int]:
    """Device, threads, versions and date; of a GPU also its memory and driver."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("vmamba", "torch", "torchvision", "timm", "triton")},
        **(_graphics() if device == "cuda" else {}),
    }


def sentence(environment: dict[str, str | int]) -> str:
    """The same in one line, for tables and plots."""
    names = ("vmamba", "torch", "timm")
    beside = f"{environment['threads']} threads"
    if "driver" in environment:
        names, beside = (*names, "triton"), f"driver {environment['driver']}, CUDA {environment['cuda']}"
    versions = ", ".join(f"{name} {environment[name]}" for name in names)
    return f"{environment['device']}, {beside}, {versions}, {environment['date']}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source tree" if package == "vmamba" else "absent"


def _graphics() -> dict[str, str | int]:
    """Of the first GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return {
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30),
        "driver": driver.strip(),
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        "mamba_ssm": _version("mamba_ssm"),
    }


def _processor() -> str:
    """The model name of the processor, with what decides its speed here."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([fields.get("model name", platform.processor() or platform.machine()), *wanted])
