"""docs/serving.md, run: Triton's configuration against the graph, the C++ program, the page in a real browser."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.cli import main
from vmamba.deploy import export_onnx
from vmamba.models.checkpoints import save_checkpoint
from vmamba.models.registry import create_model

onnxruntime = pytest.importorskip("onnxruntime")

TEXT = (Path(__file__).parents[2] / "docs/serving.md").read_text()
NAMES = ["cat", "dog", "树"]
HEIGHT, WIDTH = 40, 48


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the page's commands and Python snippets were run, as a reader would."""
    desk = tmp_path_factory.mktemp("serving")
    torch.manual_seed(0)
    model: Any = create_model("vmamba_femto_s2", num_classes=3)
    with torch.no_grad():
        model.head.fc.weight.mul_(10)
    metadata = {"class_names": NAMES, "img_size": [HEIGHT, WIDTH], "crop_pct": 1.0}
    save_checkpoint(model, desk / "model.safetensors", metadata)
    before = Path.cwd()
    os.chdir(desk)
    try:
        for line in "".join(blocks("bash")).splitlines():
            assert main(shlex.split(line, comments=True)[1:]) == 0
        for snippet in blocks("python"):
            exec(compile(snippet, "serving.md", "exec"), {})
        yield desk
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def session(desk: Path) -> Any:
    return onnxruntime.InferenceSession(str(desk / "pictures.onnx"), providers=["CPUExecutionProvider"])


def picture(seed: int) -> Image.Image:
    """One of the network's size, so that nobody has to resize it."""
    values = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((WIDTH, HEIGHT))


def expected(session: Any, image: Image.Image) -> tuple[int, np.ndarray]:
    values = np.asarray(image).reshape(*image.size[::-1], -1)
    labels, probabilities = session.run(None, {"images": values.transpose(2, 0, 1)[None]})
    return int(labels[0]), probabilities[0]


# --- Triton -----------------------------------------------------------------------------------------------------------

# What config.pbtxt may hold, of Triton's model_config.proto: name, kind of value, whether there may be several.
SCHEMA: dict[str, list[tuple[str, str, bool]]] = {
    "ModelConfig": [
        ("name", "string", False), ("backend", "string", False), ("max_batch_size", "int32", False),
        ("input", "ModelInput", True), ("output", "ModelOutput", True),
        ("dynamic_batching", "ModelDynamicBatching", False), ("instance_group", "ModelInstanceGroup", True),
    ],
    "ModelInput": [("name", "string", False), ("data_type", "DataType", False), ("dims", "int64", True),
                   ("reshape", "ModelTensorReshape", False)],
    "ModelOutput": [("name", "string", False), ("data_type", "DataType", False), ("dims", "int64", True),
                    ("reshape", "ModelTensorReshape", False), ("label_filename", "string", False)],
    "ModelTensorReshape": [("shape", "int64", True)],
    "ModelDynamicBatching": [("preferred_batch_size", "int32", True),
                             ("max_queue_delay_microseconds", "uint64", False)],
    "ModelInstanceGroup": [("name", "string", False), ("kind", "Kind", False), ("count", "int32", False)],
}  # fmt: skip
ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8",
                 "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING"],
    "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"],
}  # fmt: skip


def schema_of_triton() -> Any:
    """The class of Triton's configurations: its own if tritonclient is installed, or one from the excerpt above."""
    if spec := find_spec("tritonclient"):
        (folder,) = spec.submodule_search_locations or ()
        own = spec_from_file_location("model_config_pb2", f"{folder}/grpc/model_config_pb2.py")
        module = module_from_spec(own)
        own.loader.exec_module(module)
        return module.ModelConfig
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="excerpt.proto", package="excerpt", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    kinds = {"string": 9, "int32": 5, "int64": 3, "uint64": 4}
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, (field, kind, is_repeated) in enumerate(fields, start=1):
            entry = message.field.add(name=field, number=number, label=3 if is_repeated else 1)
            entry.type = kinds.get(kind) or (14 if kind in ENUMS else 11)
            if kind not in kinds:
                entry.type_name = f".excerpt.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("excerpt.ModelConfig"))


def test_tritons_configuration_fits_the_graph(desk: Path, session: Any) -> None:
    from google.protobuf import text_format

    text = (desk / "models/pictures/config.pbtxt").read_text()
    assert text == blocks("protobuf")[0]
    config = text_format.Parse(text, schema_of_triton()())
    assert (config.name, config.backend) == ("pictures", "onnxruntime")
    assert config.max_batch_size > 1
    types = {"tensor(uint8)": "TYPE_UINT8", "tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}
    for entries, values in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [entry.name for entry in entries] == [value.name for value in values]
        for entry, value in zip(entries, values, strict=True):
            batch, *sides = value.shape
            assert isinstance(batch, str)  # open, as max_batch_size asks for
            kinds = entry.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
            assert kinds[entry.data_type].name == types[value.type]
            dims = list(entry.reshape.shape) if entry.HasField("reshape") else list(entry.dims)
            assert dims == [side if isinstance(side, int) else -1 for side in sides]
            assert np.prod(entry.dims) == 1 or not entry.HasField("reshape")
    labels = (desk / "models/pictures" / config.output[1].label_filename).read_text(encoding="utf-8").splitlines()
    assert labels == NAMES
    assert list(config.output[1].dims) == [len(labels)]


def test_tritons_folder_is_as_shown(desk: Path, session: Any) -> None:
    found = sorted(str(path.relative_to(desk)) for path in (desk / "models").rglob("*") if path.is_file())
    names = re.findall(r"[\w.]+\.(?:onnx|pbtxt|txt)", blocks("text")[0])
    assert found == ["models/pictures/1/model.onnx", "models/pictures/config.pbtxt", "models/pictures/labels.txt"]
    assert sorted(Path(path).name for path in found) == sorted(names)
    served = onnxruntime.InferenceSession(str(desk / found[0]), providers=["CPUExecutionProvider"])
    batch = np.stack([np.asarray(picture(seed)).transpose(2, 0, 1) for seed in range(3)])
    for ours, theirs in zip(session.run(None, {"images": batch}), served.run(None, {"images": batch}), strict=True):
        assert np.array_equal(ours, theirs)


# --- C++ --------------------------------------------------------------------------------------------------------------


def headers_and_library(folder: Path) -> tuple[Path, Path] | None:
    """ONNX Runtime's folders of C++ headers, if they are installed, and of its library, which the wheel has as well.

    Args:
        folder: where the wheel's library gets the names that a linker and a loader look for.
    """
    named = os.environ.get("ONNXRUNTIME_ROOT")
    roots = [Path(root) for root in (named, "/usr/local", "/usr") if root]
    header = next((header for root in roots for header in (root / "include").rglob("onnxruntime_cxx_api.h")), None)
    libraries = [place / part for place in roots for part in ("lib", "lib/x86_64-linux-gnu")]
    library = next((place for place in libraries if (place / "libonnxruntime.so").exists()), None)
    if library is None:
        for wheels in Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"):
            for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
                (folder / name).symlink_to(wheels)
            library = folder
    return (header.parent, library) if header and library else None


def test_the_cpp_program_gives_the_same_label(desk: Path, session: Any, tmp_path: Path) -> None:
    found = headers_and_library(tmp_path)
    if found is None or shutil.which("g++") is None:
        pytest.skip("no C++ headers of ONNX Runtime: libonnxruntime-dev in Debian 13, or a release in ONNXRUNTIME_ROOT")
    include, library = found
    (tmp_path / "classify.cpp").write_text(blocks("cpp")[0])
    (command,) = re.findall(r"`(g\+\+ [^`]*)`", TEXT)
    command = command.replace("INCLUDE", str(include)).replace("LIB", str(library))
    subprocess.run([*shlex.split(command), "-Wall", "-Werror"], cwd=tmp_path, check=True)
    export_onnx(create_model("vmamba_femto", num_classes=4, in_chans=1), tmp_path / "grey.onnx", embed=True)
    grey = onnxruntime.InferenceSession(str(tmp_path / "grey.onnx"), providers=["CPUExecutionProvider"])
    for file, network, image in (
        (desk / "pictures.onnx", session, picture(1)),
        (tmp_path / "grey.onnx", grey, picture(2).convert("L")),
    ):
        words = [tmp_path / "classify", file, str(WIDTH), str(HEIGHT)]
        done = subprocess.run(words, input=image.tobytes(), capture_output=True, check=True)
        label, probabilities = expected(network, image)
        printed, probability = done.stdout.split()
        assert int(printed) == label
        assert float(probability) == pytest.approx(probabilities[label], abs=1e-4)
        short = subprocess.run(words, input=b"abc", capture_output=True, check=False)
        wanted = len(image.getbands()) * WIDTH * HEIGHT
        assert (short.returncode, short.stderr) == (1, f"3 bytes came; expected {wanted}\n".encode())


# --- The browser ------------------------------------------------------------------------------------------------------

VERSION = "1.30.0"  # of onnxruntime-web
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def package_of_the_web() -> Path:
    """The files of onnxruntime-web, fetched by npm once and kept outside of the repository."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmamba/tests" / f"ort-web-{VERSION}"
    if all((cache / name).is_file() for name in FILES):
        return cache
    if shutil.which("npm") is None:
        pytest.skip("there is no npm to fetch onnxruntime-web with")
    cache.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", "--ignore-scripts", f"onnxruntime-web@{VERSION}"]
    try:
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm could not fetch onnxruntime-web in two minutes")
    archive = cache / f"onnxruntime-web-{VERSION}.tgz"
    if done.returncode or not archive.is_file():
        pytest.skip(f"npm could not fetch onnxruntime-web: {done.stderr.strip()[:200]}")
    with tarfile.open(archive) as tar:
        for name in FILES:
            partial = cache / f".{name}.{os.getpid()}"
            partial.write_bytes(tar.extractfile(f"package/dist/{name}").read())
            partial.replace(cache / name)
    archive.unlink(missing_ok=True)
    return cache


class Files(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript", ".wasm": "application/wasm"}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
def test_the_page_in_a_browser_gives_the_same_labels(desk: Path, session: Any, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    for name in FILES:
        shutil.copy(package_of_the_web() / name, desk / name)
    (desk / "index.html").write_text(blocks("html")[0], encoding="utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=str(desk)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here, asked, seen = f"http://127.0.0.1:{server.server_port}/", [], set()
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
            page = browser.new_page()
            page.set_default_timeout(60_000)
            page.on("request", lambda request: asked.append(request.url))
            page.goto(f"{here}index.html")
            page.wait_for_selector("input:enabled")
            for seed in range(4):
                image = picture(seed)
                image.save(file := tmp_path / f"{seed}.png")
                before = page.locator("output").inner_text()
                page.set_input_files("input", file)
                page.wait_for_function("before => document.querySelector('output').textContent !== before", arg=before)
                label, probabilities = expected(session, image)
                assert page.locator("output").inner_text() == f"{NAMES[label]}: {100 * probabilities[label]:.2f} %"
                seen.add(page.locator("output").inner_text())

            # The numbers themselves, at another size and for two pictures at once.
            batch = np.random.default_rng(9).integers(0, 256, (2, 3, 33, 52), dtype=np.uint8)
            found = page.evaluate(
                """async ([values, dims]) => {
                  const ort = await import("./ort.wasm.bundle.min.mjs");
                  const options = { executionProviders: ["wasm"] };
                  const session = await ort.InferenceSession.create("./pictures.onnx", options);
                  const images = new ort.Tensor("uint8", Uint8Array.from(values), dims);
                  const { labels, probabilities } = await session.run({ images });
                  return [Array.from(labels.data, Number), Array.from(probabilities.data)];
                }""",
                [batch.ravel().tolist(), list(batch.shape)],
            )
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
    labels, probabilities = session.run(None, {"images": batch})
    assert found[0] == labels.tolist()
    assert np.abs(np.reshape(found[1], (2, 3)) - probabilities).max() < 1e-5
    assert len(seen) == 4
    assert {"pictures.onnx", "pictures.json", FILES[0], FILES[2]} <= {url.removeprefix(here) for url in asked}
    assert [url for url in asked if not url.startswith((here, "blob:", "data:"))] == []
