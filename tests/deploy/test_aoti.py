"""Packages of AOTInductor against the models they were made from, in Python and in C++."""

from __future__ import annotations

import ctypes
import io
import json
import re
import shutil
import subprocess
import zipfile
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pytest
import torch
from compiling import operators_in
from PIL import Image

import vmamba
from vmamba.cli import main
from vmamba.deploy import aoti, export_aoti
from vmamba.errors import ExportError
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.vmamba import VMamba
from vmamba.ops.backends.native.products import multiplies_fast
from vmamba.tasks.prediction import preprocessing_of

EXAMPLE = Path(__file__).parents[2] / "examples/cpp"
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def _kernels_compiled_once(tmp_path_factory):
    """With the same flags: it takes as long as all else."""
    compiled, kept = aoti._compiled_kernels, {}

    def once(compiler, folder):
        flags = tuple(aoti._FLAGS)
        if flags not in kept:
            kept[flags] = compiled(compiler, tmp_path_factory.mktemp("kernels"))
        return kept[flags]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aoti, "_compiled_kernels", once)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its package with normalisation and decision, and what the command says that writes it."""
    torch.manual_seed(0)
    options = {"depths": (1, 1), "dims": (8, 12), "num_classes": 4, "img_size": 16, "stem_stride": 2}
    model = vmamba.create_model("vmamba_femto", **options).eval()
    model.stages[1].blocks[0].ss2d.pattern = "bidirectional"
    weights = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_checkpoint(model, weights, {"class_names": ["cat", "dog", "树", "car"]})
    path, programs, said = tmp_path_factory.mktemp("aoti") / "model.pt2", [], io.StringIO()
    lay_out, hidden = aoti._lay_out, "-fvisibility=hidden"
    assert hidden in aoti._FLAGS
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        # A test below calls the operators of this package, which nobody sees of others.
        patch.setattr(aoti, "_FLAGS", [flag for flag in aoti._FLAGS if flag != hidden])
        patch.setattr(aoti, "_lay_out", lambda program, *rest: programs.append(program) or lay_out(program, *rest))
        command = ["export", str(weights), "--format", "aoti", "--embed", "true", "--output", str(path)]
        assert main(command) == 0, said.getvalue()
    if multiplies_fast(torch.float32):  # all that there are kernels for
        names = ["package_input", "conv_stem", "vss_block", "grid_convolution", "vss_block"]
        assert operators_in(programs[0]) == [f"vmamba.{name}.default" for name in names]
    assert list(path.parent.iterdir()) == [path]
    return model, path, said.getvalue()


def _expected(model, pictures):
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        return model((pictures / 255 - mean) / std).softmax(1)


def test_the_command_says_how_near_the_package_is(made):
    _, path, said = made
    size = f"{path.stat().st_size / 1e6:.1f}"
    assert re.search(rf"^\S*model\.pt2: {re.escape(size)} MB, \d+ s$", said, re.MULTILINE)
    line = r"^checked on ([\d×]+): differs from the model by (\S+) of the largest output$"
    checks = re.findall(line, said, re.MULTILINE)
    assert len(dict(checks)) == 3
    assert max(float(share) for _, share in checks) < 1e-5


def test_packages_take_any_size(made):
    model, path, _ = made
    package = torch._inductor.aoti_load_package(str(path))
    metadata = package.get_metadata()
    assert json.loads(metadata["class_names"]) == ["cat", "dog", "树", "car"]
    assert json.loads(metadata["preprocessing"])["mean"] == pytest.approx([0.485, 0.456, 0.406])
    for shape in ((1, 3, 16, 16), (3, 3, 9, 31), (1, 3, 4, 4), (0, 3, 8, 8)):
        pictures = torch.randint(0, 256, shape, dtype=torch.uint8)
        expected = _expected(model, pictures)
        labels, probabilities = package(pictures)
        torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-6)
        assert labels.tolist() == expected.argmax(1).tolist()


def _unfit(images):
    """What a package must not take for images, and what it says of each."""
    shape = tuple(images.shape)
    other = torch.float64 if images.dtype is torch.float32 else torch.float32
    return {
        f"images of shape {shape} in another dtype": images.to(other),
        f"images of shape {(shape[0], 1, *shape[2:])}": images[:, :1],
        f"images of shape {(shape[0], 6, *shape[2:])}": torch.cat([images, images], 1),
        f"images of shape {shape[1:]}": images[0],
        f"images of shape {(1, *shape)}": images[None],
    }


def _assert_told(package, unfit, wanted):
    for said, images in unfit.items():
        with pytest.raises(RuntimeError, match=re.escape(f"{said}; this package takes {wanted} on the CPU")):
            package(images)


def _laid_out(images):
    """The same images, in memory otherwise."""
    yield images.to(memory_format=torch.channels_last)
    yield images.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.cat([images, images], 3)[..., : images.shape[3]]
    yield torch.stack([images, images], -1)[..., 0]
    yield images[:1].expand_as(images)


def test_packages_look_at_what_they_are_given(made):
    package = torch._inductor.aoti_load_package(str(made[1]))
    pictures = torch.randint(0, 256, (2, 3, 9, 12), dtype=torch.uint8)
    for one in _laid_out(pictures):
        expected = _expected(made[0], one)
        torch.testing.assert_close(package(one)[1], expected, rtol=1e-4, atol=1e-6)
    _assert_told(package, _unfit(pictures), "(any, 3, any, any) in uint8")


class _Tiny(torch.nn.Sequential):
    """Not ours, and for one size."""

    pretrained_cfg = {"input_size": (3, 10, 14)}  # noqa: RUF012

    def __init__(self):
        conv = torch.nn.Conv2d(3, 4, 3, stride=2)
        super().__init__(conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 4 * 6, 5))


def test_packages_for_one_size_take_no_other(tmp_path):
    torch.manual_seed(0)
    model = _Tiny().eval()
    written = export_aoti(model, tmp_path / "model.pt2", sizes="batch")
    package = torch._inductor.aoti_load_package(str(written.path))
    images = torch.randn(2, 3, 10, 14)
    for one in (*_laid_out(images), images[:0]):
        torch.testing.assert_close(package(one), model(one).detach(), rtol=1e-4, atol=1e-6)
    unfit = _unfit(images) | {
        "images of shape (2, 3, 9, 14)": images[:, :, 1:], "images of shape (2, 3, 10, 6)": images[..., :6],
        "images of shape (2, 3, 20, 28)": images.repeat(1, 1, 2, 2),
    }  # fmt: skip
    _assert_told(package, unfit, "(any, 3, 10, 14) in float32")


# Of a call's tensors, by number, the dimensions that may be of any size.
_IMAGE, _GRID = {0: (0, 2, 3)}, {0: (0, 1, 2)}


def _calls():
    """Of each operator in a package: its arguments, and those dimensions."""

    def scan(channels, K=4, R=2, N=3):
        shapes = (K, channels, R), (K, channels), (K, channels, N), (K, channels)
        return [torch.rand(shape) * sign for shape, sign in zip(shapes, (1, 1, -1, 1), strict=True)]

    weights = [
        torch.randn(shape) for shape in ((3,), (3,), (12, 3), (12,), (6, 1, 3, 3), (6,), (6,), (6,), (3, 6), (3,))
    ]
    mlp = [torch.randn(shape) for shape in ((3,), (3,), (8, 3), (8,), (3, 8), (3,))]
    stem = [torch.randn(shape) for shape in ((4, 3, 3, 3), (4,), (4,), (4,), (6, 4, 3, 3), (6,), (6,), (6,))]
    image, grid = torch.randn(2, 3, 9, 7), torch.randn(2, 5, 4, 6)
    block = [torch.randn(2, 5, 4, 3), torch.randn(4, 8, 6), *scan(6), *weights, *mlp]
    return {
        "conv_stem": ([image, *stem, 2, 1, 1e-5, 1e-5], _IMAGE),
        "grid_convolution": ([grid, torch.randn(4, 6, 3, 3), [2, 2], [1, 1], [1, 1], 1], _GRID | {1: (0,)}),
        "depthwise_silu": ([grid, torch.randn(6, 1, 3, 3), torch.randn(6)], _GRID),
        "linear": ([grid, torch.randn(8, 6), torch.randn(8)], _GRID),
        "recurrence": ([torch.rand(2, 7, 5), torch.randn(2, 7, 5), True], {}),
        "ss2d_scan": ([grid, torch.randn(2, 5, 4, 4, 8), *scan(6), "cross", "native"], {}),
        "vss_block": ([*block, "bidirectional", True, False, 1e-5, 1e-5, 1e-5], _GRID),
    }


def _call_in_package(library, name, arguments):
    """What a package's operator gives: its status, and the tensor."""
    handles = torch._C._aoti
    of_capsule, capsule_of = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_New
    of_capsule.restype, of_capsule.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule_of.restype, capsule_of.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsules, given, kinds = [], [], iter(aoti._DECLARATIONS[name].split(", "))

    def handle(tensor):
        capsules.append(handles.unsafe_alloc_void_ptr_from_tensor(tensor))
        return ctypes.c_void_p(of_capsule(capsules[-1], None))

    for argument, kind in zip(arguments, kinds, strict=False):
        if kind == "T":
            given.append(handle(argument))
        elif kind == "?":
            given.append(None if argument is None else ctypes.byref(handle(argument)))
        elif kind == "const int64_t*":
            given += [(ctypes.c_int64 * len(argument))(*argument), ctypes.c_int64(len(argument))]
            next(kinds)
        elif kind == "const char*":
            given.append(ctypes.c_char_p(argument.encode()))
        else:
            given.append(
                {"double": ctypes.c_double, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}[kind](argument)
            )
    result = ctypes.c_void_p()
    status = getattr(library, f"aoti_torch_cpu_{name}")(*given, ctypes.byref(result))
    if result.value:
        capsules.append(capsule_of(result.value, None, None))
    tensors = [handles.alloc_tensor_by_stealing_from_void_ptr(capsule) for capsule in capsules]
    return status, tensors[-1]


@pytest.mark.skipif(not hasattr(torch._C, "_aoti"), reason="this torch gives no handles of tensors")
def test_operators_check_shapes(made, tmp_path):
    """A package has them without Python, which checks elsewhere: what does not fit is an error, not a crash."""
    with zipfile.ZipFile(made[1]) as package:
        (name,) = (name for name in package.namelist() if name.endswith(".so"))
        library = ctypes.CDLL(package.extract(name, tmp_path))
    calls = _calls()
    assert calls.keys() | {"package_input"} == aoti._DECLARATIONS.keys()  # which throws, as ctypes cannot
    for name, (arguments, free) in calls.items():
        status, y = _call_in_package(library, name, arguments)
        assert status == 0, name
        torch.testing.assert_close(y, getattr(torch.ops.vmamba, name)(*arguments), rtol=1e-4, atol=1e-5)
        for i, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor):
                continue
            shorter = [argument.narrow(d, 1, argument.shape[d] - 1).clone() for d in range(argument.ndim)]
            wrong = [value for d, value in enumerate(shorter) if d not in free.get(i, ())]
            for value in (*wrong, argument.double(), argument.flatten()[:0]):
                status, _ = _call_in_package(library, name, [*arguments[:i], value, *arguments[i + 1 :]])
                assert status != 0, (name, i, value.dtype, value.shape)
        assert _call_in_package(library, name, arguments)[0] == 0, name


def test_what_is_no_block_of_ours(tmp_path):
    """Gated blocks of several states without a kernel for one of their layers; patches in place of convolutions."""
    torch.manual_seed(0)
    model = VMamba(
        depths=(1, 1), dims=(8, 12), num_classes=4, img_size=16, mlp_ratio=0, gated=True, ssm_ratio=2, d_state=3,
        conv_bias=True, stem="patch", downsample="merge",
    ).eval()  # fmt: skip
    model.stages[1].blocks[0].ss2d.norm = torch.nn.Identity()
    written = export_aoti(model, tmp_path / "model.pt2")
    assert max(written.differences.values()) < 1e-5
    package = torch._inductor.aoti_load_package(str(written.path))
    x = torch.randn(2, 3, 40, 23)
    with torch.no_grad():
        torch.testing.assert_close(package(x), model(x), rtol=1e-4, atol=1e-6)


def test_the_example_in_cpp(made, tmp_path):
    """Built as its first line says, and run on two pictures."""
    if shutil.which("cmake") is None:
        pytest.skip("there is no CMake")
    model, path, _ = made
    configure = ["cmake", "-S", EXAMPLE, "-B", tmp_path / "build", f"-DTORCH={torch.__path__[0]}"]
    for command in (configure, ["cmake", "--build", tmp_path / "build"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    pictures = [np.random.default_rng(i).integers(0, 256, (16 + i, 20, 3), np.uint8) for i in range(2)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.ppm")
    command = [tmp_path / "build/classify", path, tmp_path / "0.ppm", tmp_path / "1.ppm"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    classes, *lines = done.stdout.splitlines()
    assert json.loads(classes.removeprefix("classes: ")) == ["cat", "dog", "树", "car"]
    for picture, line in zip(pictures, lines, strict=True):
        (expected,) = _expected(model, torch.from_numpy(picture).permute(2, 0, 1)[None])
        label, probability = line.split(": ")[1].split()
        assert int(label) == expected.argmax()
        assert float(probability) == pytest.approx(float(expected.max()), abs=1e-4)
    (tmp_path / "short.ppm").write_bytes((tmp_path / "0.ppm").read_bytes()[:-1])
    done = subprocess.run([*command[:2], tmp_path / "short.ppm"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "short.ppm: this is no binary PPM or PGM" in done.stderr
    Image.fromarray(pictures[0][..., 0]).save(tmp_path / "grey.pgm")
    for wrong in ([path, tmp_path / "grey.pgm"], [tmp_path / "none.pt2"]):  # an error of torch's is one of ours
        done = subprocess.run([command[0], *wrong], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f"{wrong[-1]}: " in done.stderr
    grey = vmamba.create_model("vmamba_femto", depths=(1,), dims=(8,), num_classes=2, in_chans=1, img_size=16).eval()
    written = export_aoti(grey, tmp_path / "grey.pt2", embed=True)
    done = subprocess.run([command[0], written.path, tmp_path / "grey.pgm"], capture_output=True, text=True, check=True)
    label, probability = done.stdout.splitlines()[1].split(": ")[1].split()
    with torch.no_grad():
        seen = preprocessing_of(grey).normalise(torch.from_numpy(pictures[0][..., 0])[None, None])
        (expected,) = grey(seen).softmax(1)
    assert int(label) == expected.argmax()
    assert float(probability) == pytest.approx(float(expected.max()), abs=1e-4)


def test_refusals(tmp_path, monkeypatch, capsys):
    detector = vmamba.create_model("maskrcnn", backbone="vmamba_femto", num_classes=2, channels=8, hidden=8)
    with pytest.raises(ExportError, match="is a model for detection"):
        export_aoti(detector, tmp_path / "model.pt2")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    from torch._inductor import config

    # by torch's own patch: pytest's takes the option away for good when it is undone
    nowhere = config.patch({"cpp.cxx": (None, "/nowhere/c++")})
    with nowhere, pytest.raises(ExportError, match=r"needs a C\+\+ compiler"):
        export_aoti(vmamba.create_model("vmamba_femto"), tmp_path / "model.pt2")
    with nowhere:
        command = ["export", "vmamba_femto", "--pretrained", "false", "--format", "aoti"]
        assert main([*command, "--output", str(tmp_path / "model.pt2")]) == 1
    assert "a package of AOTInductor needs a C++ compiler" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_kernels_are_compiled_as_the_build_compiles_them():
    """Both name the same sources and flags; where they differ is said here."""
    build = (Path(__file__).parents[2] / "CMakeLists.txt").read_text()

    def words(pattern):
        return re.search(pattern, build, re.DOTALL)[1].split()

    library = [Path(name).stem for name in words(r"add_library\(vmamba_native MODULE(.*?)\)")]
    assert {*aoti._SOURCES} == {Path(name).stem for name in words(r"set\(kernels (.*?)\)")} | {*library, "package"}
    flags = {flag for flag in words(r'set\(CMAKE_CXX_FLAGS\s+"\${CMAKE_CXX_FLAGS} (.*?)"') if flag[:2] != "-W"}
    flags |= {*words(r'CMAKE_CXX_FLAGS_RELEASE "(.*?)"'), f"-std=c++{words(r'CMAKE_CXX_STANDARD (.*?)[)]')[0]}"}
    flags |= {f"-fvisibility={words('CXX_VISIBILITY_PRESET (.*?)[)]')[0]}"}
    assert words(r"POSITION_INDEPENDENT_CODE (.*?)\)") == ["ON"]
    own = {"-c", "-w", "-fPIC", "-fopenmp", "-DVMAMBA_ISA=baseline", '-DEXPORT=extern "C"'}
    assert {*aoti._FLAGS} - own == flags - {"-fno-exceptions"}  # package.cpp throws some
    # A package has kernels for one instruction set, those for bfloat16 not among them.
    avx512, avx2 = words(r"set\(avx512 (.*?)\)"), words(r'add_kernels\(avx2 "\${kernels}" (.*?)\)')
    assert {"avx2": avx2, **dict.fromkeys(("avx512", "avx512_bf16", "amx_bf16"), avx512)} == aoti._INSTRUCTIONS
    # Where the build has other flags for a file, no package calls what is in it.
    files = [Path(name).stem for name in words(r"set_source_files_properties\((.*?) PROPERTIES")]
    assert files == ["roi_align", "nms"]
    assert aoti._DECLARATIONS.keys().isdisjoint(files)
