"""A model compiled ahead of time by inductor: a package that C++ runs without Python, checked before it takes its name.

What this package's CPU kernels compute stays an operator in the graph, as it does for torch.compile, and these kernels
(`csrc/`, behind `csrc/package.cpp`) are compiled for the processor at hand and linked into the same shared library as
the layers that inductor writes, so that the package needs torch's C++ library and nothing of ours.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import vmamba
from vmamba.data.transforms import Preprocessing
from vmamba.deploy.export import TOLERANCE, Exported, Network, checked, graph_preprocessing, metadata_of, surrounded
from vmamba.deploy.graphs import Images, check_target, outputs_of, prepared, traced
from vmamba.errors import ExportError, first_line
from vmamba.files import replacing
from vmamba.ops.backends.native.library import kernels
from vmamba.ops.backends.native.products import multiplies_fast
from vmamba.ops.exporting import operators_kept
from vmamba.ops.routes import PATTERNS

_CODE = Path(vmamba.__file__).parent / "csrc"
# Kernels for one instruction set, those of interface.cpp's "baseline"; what calls them; the operators.
_SOURCES = (
    "scan", "layers", "products", "roi_align", "enlarging", "nms", "winograd",
    "interface", "block", "convolution", "stem", "package",
)  # fmt: skip
# As in CMakeLists.txt, but with exceptions, which package.cpp throws, and without what is there for the two files that
# nothing in a package calls, roi_align and nms; and what each instruction set needs.
_FLAGS = [
    "-c",
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-DVMAMBA_ISA=baseline",
    '-DEXPORT=extern "C"',  # to the package's own operators alone
    "-fvisibility=hidden",
    "-w",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
_AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
_INSTRUCTIONS = dict.fromkeys(("amx_bf16", "avx512_bf16", "avx512"), _AVX512) | {"avx2": ["-mavx2", "-mfma"]}

# What inductor is told of the operators' functions in package.cpp: T a tensor, ? one that may be missing.
_DECLARATIONS = {
    "conv_stem": "T, T, ?, ?, ?, T, ?, ?, ?, int64_t, int64_t, double, double",
    "grid_convolution": f"T, T, {3 * 'const int64_t*, int64_t, '}int64_t",
    "depthwise_silu": "T, T, ?",
    "linear": "T, T, ?",
    "recurrence": "T, T, int32_t",
    "ss2d_scan": "T, T, T, T, T, T, const char*, const char*",
    "vss_block": f"T, T, T, T, T, T, {16 * '?, '}const char*, int32_t, int32_t, double, double, double",
    "package_input": "T, const int64_t*, int64_t, int32_t",
}


@torch.library.custom_op("vmamba::package_input", mutates_args=())
def _package_input(x: Tensor, sizes: Sequence[int], is_uint8: bool) -> Tensor:
    """The images that a package is given, in a copy that is dense; of other sizes or another dtype, an error.

    What inductor writes believes what it was told of its inputs, and would read past the end of smaller ones.

    Args:
        x: images.
        sizes: that they must have, -1 where any will do.
        is_uint8: whether they must be uint8; float32 otherwise.
    """
    return x.clone(memory_format=torch.contiguous_format)


@_package_input.register_fake
def _(x: Tensor, sizes: Sequence[int], is_uint8: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _declaration(name: str) -> str:
    given = _DECLARATIONS[name].replace("T", "AtenTensorHandle").replace("?", "AtenTensorHandle*")
    return f"AOTITorchError aoti_torch_cpu_{name}({given}, AtenTensorHandle*)"


def export_aoti(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    embed: bool = False,
    sizes: Literal["open", "batch"] = "open",
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Compile a classifier, a segmentation model or a feature extractor for this kind of processor.

    The package takes normalised float32 images (B, C, H, W) and gives the model's outputs. It is read in C++ by
    `torch::inductor::AOTIModelPackageLoader` and in Python by `torch._inductor.aoti_load_package`, with the torch it
    was made with, and its `get_metadata()` has what an ONNX file's metadata has. It holds machine code: load only what
    you trust. A C++ compiler is needed to make it and none to run it; the processor that runs it must have the vector
    instructions of the one it was made on.

    Args:
        model: any of ours or timm's, changed as you like; not one for detection.
        path: the file to write.
        embed, sizes, class_names, preprocessing, tolerance: as of `export_onnx`.

    Raises:
        ExportError: the model has no such graph, there is no compiler, the path cannot be written to, or the package
            computes something else.
    """
    from torch._inductor import aoti_compile_and_package, aoti_load_package, config

    start, target = time.perf_counter(), check_target(path, ".pt2")
    compiler = _compiler()
    images = Images.of(model, is_open=sizes == "open")
    told = graph_preprocessing(model, images, preprocessing)
    network, inputs = surrounded(model, Network(prepared(model), torch.float32), told, embed)
    with operators_kept(layers=multiplies_fast(torch.float32)):
        program = traced(network, inputs(images.example()), images)
    operators = {name: getattr(torch.ops.vmamba, name).default for name in _DECLARATIONS}
    _lay_out(program, list(operators.values()))
    _check_inputs(program)
    metadata = metadata_of(model, class_names, told)
    with tempfile.TemporaryDirectory() as folder:
        objects = _compiled_kernels(compiler, Path(folder))
        package = Path(folder) / "model.pt2"
        options: dict[str, Any] = {
            "aot_inductor.custom_ops_to_c_shims": {
                operator: [_declaration(name)] for name, operator in operators.items()
            },
            # What stands here follows "-l" on the linker's command line.
            "aot_inductor.custom_op_libs": [f":{part.name} -L{part.parent}" for part in objects],
            "aot_inductor.metadata": metadata,
        }
        if hasattr(config.aot_inductor, "enable_line_tables"):  # which torch 2.11 has not
            options["aot_inductor.enable_line_tables"] = False
        try:
            aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)
        except Exception as error:  # whatever inductor or the compiler says
            said = first_line(error)
            raise ExportError(f"{type(model).__name__} could not be compiled by inductor: {said}") from error
        run = aoti_load_package(str(package))
        first = int(embed)  # where two classes are almost equal, rounding decides the label
        differences = checked(
            lambda batch: outputs_of(run(batch))[first:],
            lambda batch: outputs_of(network(batch))[first:],
            map(inputs, images.trials()),
            TOLERANCE if tolerance is None else tolerance,
            target,
        )
        with replacing(target) as partial:
            partial.write_bytes(package.read_bytes())
    return Exported(target, time.perf_counter() - start, differences)


def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except Exception as error:  # inductor's own, of whatever it tried
        raise ExportError(
            "a package of AOTInductor needs a C++ compiler, and none was found; install GCC 12 or Clang 15, or newer,"
            " or name one in the environment variable CXX"
        ) from error


def _compiled_kernels(compiler: str, folder: Path) -> list[Path]:
    """This package's kernels and operators as object files."""
    rows = (
        f'{{"{name}", {{{", ".join(str(route.bits) for route in routes)}}}}}'
        for name, routes in PATTERNS.items()
        if isinstance(routes, tuple)
    )
    flags = [*_FLAGS, *_INSTRUCTIONS.get(kernels() or "", []), f"-DVMAMBA_PATTERNS={', '.join(rows)}"]

    def compiled(name: str) -> Path:
        made = folder / f"{name}.o"
        command = [compiler, *flags, "-o", str(made), str(_CODE / f"{name}.cpp")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ExportError(f"the kernels could not be compiled by {compiler}: {done.stderr.strip()[-500:]}")
        return made

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return list(threads.map(compiled, _SOURCES))


def _lay_out(program: torch.export.ExportedProgram, operators: Sequence[Any]) -> None:
    """Give our operators dense tensors, as their kernels take them."""
    signature = program.graph_signature
    kept = {*signature.inputs_to_parameters, *signature.inputs_to_buffers, *signature.inputs_to_lifted_tensor_constants}
    for operator in operators:
        for node in program.graph.find_nodes(op="call_function", target=operator):
            for i, value in enumerate(node.args):
                if not isinstance(value, torch.fx.Node):
                    continue
                if value.name in kept and value.meta["val"].is_contiguous():
                    continue
                with program.graph.inserting_before(node):
                    dense = program.graph.call_function(
                        torch.ops.aten.clone.default, (value,), {"memory_format": torch.contiguous_format}
                    )
                dense.meta = _dense(value.meta)
                node.update_arg(i, dense)


def _dense(meta: dict[str, Any]) -> dict[str, Any]:
    """What a graph says of a tensor, for a dense copy of it."""
    return meta | {"val": meta["val"].clone(memory_format=torch.contiguous_format)}


def _check_inputs(program: torch.export.ExportedProgram) -> None:
    """Let images through `_package_input`."""
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name not in program.graph_signature.user_inputs:
            continue
        images = node.meta["val"]
        sizes = [size if isinstance(size, int) else -1 for size in images.shape]
        with program.graph.inserting_after(node):
            checked = program.graph.call_function(
                torch.ops.vmamba.package_input.default, (node, sizes, images.dtype is torch.uint8)
            )
        checked.meta = _dense(node.meta)
        node.replace_all_uses_with(checked, delete_user_cb=lambda user, checked=checked: user is not checked)
