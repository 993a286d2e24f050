"""The kernels in Clang, for other processors and systems than this one: what macOS makes of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
BUILD = (ROOT / "CMakeLists.txt").read_text()
COMMON = ["interface.cpp", "block.cpp", "convolution.cpp", "stem.cpp"]
KERNELS = re.search(r"set\(kernels ([^)]+)\)", BUILD)[1].split()
FLAGS = re.search(r'"\$\{CMAKE_CXX_FLAGS\} (-Wall [^"]+)"', BUILD)[1].split()
FLAGS = [flag for flag in FLAGS if not flag.startswith("-Wno")]  # those are for GCC
WIDEST = [*re.search(r"set\(avx512 ([^)]+)\)", BUILD)[1].split(), "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]


@pytest.mark.parametrize(
    ("target", "source", "options"),
    [
        *(("aarch64-macos", source, ()) for source in [*COMMON, *KERNELS]),
        *(("x86_64-linux-gnu", source, (*WIDEST, "-DVMAMBA_X86")) for source in ("products.cpp", "scan.cpp")),
    ],
)
def test_clang_compiles(target, source, options, tmp_path):
    pytest.importorskip("ziglang", reason="Clang for other systems: pip install ziglang")
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-std=c++17", *FLAGS, "-Werror", *options]
    command += ["-DVMAMBA_ISA=kernels", "-c", str(ROOT / "src/vmamba/csrc" / source), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
