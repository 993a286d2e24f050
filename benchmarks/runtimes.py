"""One network in one runtime: processes that hold networks and run one whenever they are asked to.

A runtime has a process of its own, with a fixed number of threads, so that no runtime's threads are in another's way;
processes stay, and one of them computes at a time. A turn's time is taken in the process, so it does not contain what
the question took. What a network gives is compared with eager PyTorch in float32 before it is timed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from workers import Worker as Process
from workers import WorkerError

EAGER, COMPILED, ORT, OPENVINO = "eager", "compiled", "ONNX Runtime", "OpenVINO"
CAST, OPEN, AOTI = "eager, cast", "OpenVINO, any size", "AOTInductor"
PRODUCTS, STEP = "products alone", "training step"
FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"
# By process. The products alone have their own: its allocator keeps what it is given back, as no runtime's does.
PROCESSES = {
    EAGER: "eager", CAST: "eager", STEP: "eager", COMPILED: "compiled", AOTI: "packages", ORT: ORT, OPENVINO: OPENVINO,
    OPEN: OPENVINO, PRODUCTS: "products",
}  # fmt: skip
TOLERANCES = {FLOAT32: 1e-4, BFLOAT16: 5e-2, INT8: 0.5}  # of the largest output; weights are random
IDLE = 0.05  # the share of a core that a process which waits may use
DROP_PATH = 0.2
Call = Callable[[], object]


@dataclass(frozen=True)
class Subject:
    """A network in a runtime.

    Attributes:
        model: its label.
        name: as timm and vmamba know it.
        mode: one of `PROCESSES`.
        size, batch: of the images.
        precision: of products and convolutions.
    """

    model: str
    name: str
    mode: str
    size: int
    batch: int = 1
    precision: str = FLOAT32

    @property
    def is_ours(self) -> bool:
        return "vmamba" in self.name

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.batch, 3, self.size, self.size)

    @property
    def row(self) -> dict[str, Any]:
        """What the tables say of it."""
        return {key: value for key, value in asdict(self).items() if key != "name"}

    def images(self) -> np.ndarray:
        """The same ones in every process."""
        return np.random.default_rng(0).standard_normal(self.shape, np.float32)


@dataclass(frozen=True)
class Shelf:
    """The folder of exported files and of results to compare with.

    Attributes:
        folder: where they lie.
        options: changes of the models, by name.
        package: what our files are made from, as a digest.
    """

    folder: Path
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    package: str = ""

    @classmethod
    def new(cls, folder: Path, options: Mapping[str, Mapping[str, Any]]) -> Self:
        """One whose files of ours belong to the package as it is now."""
        import vmamba

        digest = hashlib.sha256()
        for file in sorted(Path(vmamba.__file__).parent.rglob("*")):
            if file.suffix in (".py", ".cpp", ".h"):
                digest.update(file.read_bytes())
        return cls(folder, options, digest.hexdigest())

    def path(self, subject: Subject, kind: str) -> Path:
        """The file of a subject: ours is for images of any size, the others' for one size."""
        origin = self.package if subject.is_ours else "-".join(version(name) for name in ("timm", "torch"))
        told = hashlib.sha256(json.dumps([origin, self.options.get(subject.name)]).encode()).hexdigest()[:8]
        size = "any" if subject.is_ours and kind != "npy" else f"{subject.batch}x{subject.size}"
        return self.folder / f"{subject.name}-{size}-{told}.{kind}"

    def kind(self, subject: Subject) -> str | None:
        """Of the file that a subject is made from, by its ending; None if from none."""
        if subject.mode == AOTI:
            return "pt2"
        if subject.mode == COMPILED and subject.precision == INT8:
            return "int8.pt2"
        if subject.mode in (ORT, OPENVINO, OPEN):
            return "int8.onnx" if subject.precision == INT8 else "onnx"
        return None


# --- networks --------------------------------------------------------------------------------------------------------


def network(subject: Subject, options: Mapping[str, Any], training: bool = False) -> Any:
    """A network with random weights, the same in every process.

    Layer scales and the last normalisation of residual branches start at almost nothing, so that a wrong result inside
    a branch would not be seen; here they are larger.
    """
    import torch
    from networks import build

    options = {"drop_path_rate": DROP_PATH} | dict(options) if training else options
    model = build(subject.name, subject.size, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith(("gamma", "weight")) and parameter.abs().max() < 1e-3:
                parameter.fill_(0.1)
    return model.train(training)


def export(shelf: Shelf, subject: Subject, kind: str) -> None:
    """Write the file that runtimes read."""
    import torch

    from vmamba import deploy
    from vmamba.files import replacing

    target = shelf.path(subject, kind)
    model = network(subject, shelf.options.get(subject.name, {}))
    if not subject.is_ours:  # files of the others are for the size that they say
        model.pretrained_cfg = model.pretrained_cfg | {"input_size": subject.shape[1:]}
    if kind == "pt2":
        deploy.export_aoti(model, target, sizes="open" if subject.is_ours else "batch")
    elif kind.startswith("int8"):
        # Noise: only its time is looked at. The file before has an open batch, which calibration needs.
        noise = torch.randn(8, *subject.shape[1:], generator=torch.Generator().manual_seed(0))
        given: dict[str, Any] = {"samples": 6, "held_back": 2, "tolerance": 1.0}
        if kind == "int8.pt2":
            deploy.quantize(model, target, list(noise), format="torch", **given)
            return
        with tempfile.TemporaryDirectory() as folder:
            whole = deploy.export_onnx(
                model, Path(folder) / "whole.onnx", sizes="open" if subject.is_ours else "batch", tolerance=1e-3
            ).path
            deploy.quantize(whole, target, list(noise), **given)
    elif subject.is_ours:
        deploy.export_onnx(model, target)
    else:
        program = torch.onnx.export(
            model, (torch.from_numpy(subject.images()),), dynamo=True, opset_version=20, verbose=False,
            input_names=["images"], output_names=["logits"],
        )  # fmt: skip
        assert program is not None
        with replacing(target) as unfinished:
            program.save(unfinished, external_data=False)


# --- calls, each in the process of its runtime -----------------------------------------------------------------------


def in_torch(shelf: Shelf, subject: Subject, threads: int) -> tuple[Call, np.ndarray]:
    """A network in eager mode or compiled with its weights as constants; and what it gives."""
    import torch
    from torch import nn

    model: nn.Module
    if subject.precision == INT8:
        from vmamba.deploy import load_quantized

        model, _ = load_quantized(shelf.path(subject, "int8.pt2"))
    else:
        model = network(subject, shelf.options.get(subject.name, {}))
    images = torch.from_numpy(subject.images())
    is_low = subject.precision == BFLOAT16
    if is_low and subject.mode != EAGER:
        model, images = model.bfloat16(), images.bfloat16()
    run: Any = model
    if subject.mode == COMPILED:
        torch._dynamo.reset()
        torch._inductor.config.freezing = True  # as an option of torch.compile it comes too late for the weights
        run = torch.compile(model, dynamic=False)

    def call() -> torch.Tensor:
        # Freezing wants no_grad, and eager mode is faster in inference mode.
        with (
            torch.no_grad() if subject.mode == COMPILED else torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=is_low and subject.mode == EAGER),
        ):
            return run(images)

    call()
    return call, call().float().numpy()


def reference(shelf: Shelf, subject: Subject) -> None:
    """Write what the network gives in eager PyTorch and float32, ours without any kernel of ours."""
    import torch

    from vmamba.files import atomic_write
    from vmamba.ops import use_backend

    model = network(subject, shelf.options.get(subject.name, {}))
    with torch.inference_mode(), use_backend("eager"):
        output = model(torch.from_numpy(subject.images()))
    with atomic_write(shelf.path(subject, "npy")) as file:
        np.save(file, output.numpy())


def in_package(shelf: Shelf, subject: Subject, threads: int) -> tuple[Call, np.ndarray]:
    """A package of AOTInductor."""
    import torch

    package = torch._inductor.aoti_load_package(str(shelf.path(subject, "pt2")))
    images = torch.from_numpy(subject.images())

    def call() -> Any:
        with torch.inference_mode():
            return package(images)

    (output,) = [call()] if isinstance(call(), torch.Tensor) else call()
    return call, output.numpy()


def in_onnxruntime(shelf: Shelf, subject: Subject, threads: int) -> tuple[Call, np.ndarray]:
    """A file in ONNX Runtime, told the sizes in advance."""
    import onnxruntime

    kind = shelf.kind(subject)
    assert kind
    path = str(shelf.path(subject, kind))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for axis, size in zip(_axes(path), subject.shape, strict=True):
        if isinstance(axis, str):
            options.add_free_dimension_override_by_name(axis, size)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    images = {given.name: subject.images()}
    return lambda: session.run(None, images), session.run(None, images)[0]


def _axes(path: str) -> list[int | str]:
    """The shape of a file's input; names stand for sizes that are open."""
    import onnx

    (value,) = onnx.load(path, load_external_data=False).graph.input
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def in_openvino(shelf: Shelf, subject: Subject, threads: int) -> tuple[Call, np.ndarray]:
    """A file in OpenVINO, for one size or, where its sizes are open, for any."""
    import openvino

    kind, low = shelf.kind(subject), subject.precision == BFLOAT16
    assert kind
    core = openvino.Core()
    graph = core.read_model(str(shelf.path(subject, kind)))
    if subject.mode == OPENVINO:
        graph.reshape(list(subject.shape))
    wanted = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "bf16" if low else "f32"}
    compiled = core.compile_model(graph, "CPU", wanted)
    told = {name: compiled.get_property(name) for name in wanted}
    precision = openvino.Type.bf16 if low else openvino.Type.f32
    if told != {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}:
        raise RuntimeError(f"OpenVINO was asked for {wanted} and took {told}")
    request, images = compiled.create_infer_request(), [subject.images()]
    return lambda: request.infer(images), request.infer(images)[0].copy()


def training_step(shelf: Shelf, subject: Subject, threads: int) -> tuple[Call, None]:
    """Forward and backward in eager mode, in bfloat16 under autocast."""
    import torch
    from torch.nn import functional as F

    model = network(subject, shelf.options.get(subject.name, {}), training=True)
    images, target = torch.from_numpy(subject.images()), torch.arange(subject.batch)

    def call() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=subject.precision == BFLOAT16):
            output = model(images)
        F.cross_entropy(output.float(), target).backward()

    return call, None


def products_alone(shelf: Shelf, subject: Subject, threads: int) -> tuple[Call, None]:
    """All matrix products and convolutions of a network, with weights that oneDNN has packed.

    Each reads a part of one buffer, as if the layer before had just written it.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[tuple[str, tuple[Any, ...]]] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            kind = func.overloadpacket.__name__
            if kind in ("mm", "addmm", "convolution", "bmm", "baddbmm", "linear", "conv2d", "matmul", "conv1d"):
                shapes = tuple(tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in args)
                found.append((kind, shapes))
            return func(*args, **(kwargs or {}))

    images = torch.from_numpy(subject.images())
    with torch.inference_mode(), Noting():
        network(subject, shelf.options.get(subject.name, {}))(images)
    dtype = torch.bfloat16 if subject.precision == BFLOAT16 else torch.float32
    buffer = torch.randn(max(math.prod(shapes[0]) for _, shapes in found)).to(dtype)
    calls: list[Call] = []
    linear, convolution = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._convolution_pointwise
    for kind, given in found:
        shape, weight_shape, has_bias, *rest = (*given, *(None, [1, 1], [0, 0], [1, 1], 1)[len(given) - 2 :])
        x, weight = buffer[: math.prod(shape)], torch.randn(weight_shape).to(dtype) / 10
        bias = torch.zeros(weight_shape[0], dtype=dtype) if has_bias else None
        if kind == "linear":
            x = x.view(-1, shape[-1])
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
            calls.append(partial(linear, x, packed, bias, "none", [], ""))
        elif kind == "conv2d":
            batch, channels, height, width = shape
            x = x.view(batch, height, width, channels).permute(0, 3, 1, 2)
            stride, padding, dilation, groups = rest
            reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
            packed = reorder(weight.to_mkldnn(), padding, stride, dilation, groups, list(shape))
            calls.append(partial(convolution, x, packed, bias, padding, stride, dilation, groups, "none", [], ""))
        else:
            raise RuntimeError(f"a product of an unknown kind: {kind} of {given}")
    if not calls:
        raise RuntimeError("the network has no products")

    @torch.inference_mode()
    def call() -> None:
        for product in calls:
            product()

    return call, None


MAKERS: dict[str, Callable[[Shelf, Subject, int], tuple[Call, np.ndarray | None]]] = {
    EAGER: in_torch, CAST: in_torch, COMPILED: in_torch, AOTI: in_package, ORT: in_onnxruntime, OPENVINO: in_openvino,
    OPEN: in_openvino, STEP: training_step, PRODUCTS: products_alone,
}  # fmt: skip


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest, as a share of the largest expected; infinite if a value is not a number."""
    if found.shape != expected.shape:
        raise RuntimeError(f"its result has shape {found.shape}, and eager's {expected.shape}")
    share = np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max()
    return float(np.nan_to_num(share, nan=np.inf))


def turn(call: Call, least: float) -> float:
    """Seconds of a call: the median of as many as `least` seconds hold, without the first where there are more."""
    times: list[float] = []
    while sum(times) < least or not times:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def resident_mb(what: str) -> float:
    """MB of this process in memory, now ("VmRSS") or at most ("VmHWM")."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) / 1024


class Server:
    """What a process of this name answers."""

    def __init__(self, name: str, shelf: Shelf, threads: int) -> None:
        self.shelf, self.threads = shelf, threads
        self.calls: dict[Subject, Call] = {}
        if name not in (ORT, OPENVINO):
            import torch

            torch.set_num_threads(threads)

    def export(self, subject: Subject, kind: str) -> dict[str, Any]:
        export(self.shelf, subject, kind)
        return {}

    def reference(self, subject: Subject) -> dict[str, Any]:
        reference(self.shelf, subject)
        return {}

    def load(self, subject: Subject) -> dict[str, Any]:
        """Make it, call it twice, and compare what it gives."""
        call, output = MAKERS[subject.mode](self.shelf, subject, self.threads)
        call()
        self.calls[subject] = call
        if output is None:
            return {}
        apart, limit = difference(output, np.load(self.shelf.path(subject, "npy"))), TOLERANCES[subject.precision]
        if not apart <= limit:
            del self.calls[subject]
            raise RuntimeError(f"its result is off by {apart:.1e} of eager float32's largest; {limit:.0e} is allowed")
        return {"difference": apart}

    def run(self, subject: Subject, least: float) -> dict[str, Any]:
        return {"seconds": turn(self.calls[subject], least)}

    def peak(self, subject: Subject) -> dict[str, Any]:
        """Most memory, while it is made and called, beside what the process held before."""
        for module in ("torch", "networks"):  # what any network needs
            importlib.import_module(module)
        before = resident_mb("VmRSS")
        call, _ = MAKERS[subject.mode](self.shelf, subject, self.threads)
        call()
        return {"peak_mb": resident_mb("VmHWM") - before}


# --- the asking side -------------------------------------------------------------------------------------------------


class Worker(Process):
    """A process of a `Server`, with a fixed number of threads."""

    def __init__(self, name: str, shelf: Shelf, threads: int) -> None:
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(shelf.folder / "inductor")
        if name == PROCESSES[PRODUCTS]:
            environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}
        super().__init__(name, Server, name, shelf, threads, environment=environment)


@contextmanager
def alone() -> Any:
    """Around all timing: a place for whoever shares a machine to wait for the others."""
    yield


def turns(loaded: Sequence[tuple[Worker, Subject]], rounds: int, least: float, most: float) -> dict[Subject, float]:
    """Median seconds of each subject; all take turns, those that took `most` seconds no more than three.

    Raises:
        WorkerError: a process that waits uses a processor.
    """
    times: dict[Subject, list[float]] = {subject: [] for _, subject in loaded}
    with alone():
        workers = {id(worker): worker for worker, _ in loaded}.values()
        time.sleep(1)
        before, start = [worker.seconds_used() for worker in workers], time.perf_counter()
        time.sleep(1)
        seconds = time.perf_counter() - start
        for worker, used in zip(workers, before, strict=True):
            if (share := (worker.seconds_used() - used) / seconds) > IDLE:
                raise WorkerError(f"the process {worker.name} waits and uses {share:.0%} of a processor")
        for _ in range(rounds):
            for worker, subject in loaded:
                found = times[subject]
                if len(found) < 3 or sum(found) < most:
                    found.append(worker.ask("run", subject, least=least)["seconds"])
    return {subject: statistics.median(found) for subject, found in times.items()}


def race(
    shelf: Shelf,
    subjects: Iterable[Subject],
    threads: int,
    rounds: int,
    least: float,
    most: float,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of all subjects: seconds, images a second, the difference from eager float32, or why there are none."""
    subjects = list(subjects)
    rows = {subject: subject.row for subject in subjects}
    loaded = []
    with ExitStack() as stack, Worker("files", shelf, threads) as writer:
        workers: dict[str, Worker] = {}
        for subject in subjects:
            name, row, start = PROCESSES[subject.mode], rows[subject], time.perf_counter()
            outcome = f"  {subject.model}, {subject.mode}, {subject.precision}, {subject.batch} × {subject.size}²: "
            try:
                prepare_files(writer, shelf, subject)
                if name not in workers or workers[name].has_ended:
                    workers[name] = stack.enter_context(Worker(name, shelf, threads))
                row |= workers[name].ask("load", subject)
                loaded.append((workers[name], subject))
                say(f"{outcome}ready after {time.perf_counter() - start:.0f} s")
            except WorkerError as error:
                row["error"] = str(error)
                say(f"{outcome}{error}")
        writer.close()
        loaded = [(worker, subject) for worker, subject in loaded if not worker.has_ended]
        for subject, seconds in turns(loaded, rounds, least, most).items():
            rows[subject] |= {"seconds": seconds, "images_per_second": subject.batch / seconds}
    for row in rows.values():
        if "seconds" not in row:
            row.setdefault("error", "its process has ended")
    return list(rows.values())


def prepare_files(writer: Worker, shelf: Shelf, subject: Subject) -> None:
    """Write what a subject reads, unless it is there."""
    if subject.mode in (STEP, PRODUCTS):
        return
    kind, plain = shelf.kind(subject), replace(subject, mode=EAGER, precision=FLOAT32)
    if not shelf.path(subject, "npy").exists():
        writer.ask("reference", plain)
    if kind is not None and not shelf.path(subject, kind).exists():
        writer.ask("export", plain, kind=kind)


def peak_mb(shelf: Shelf, subject: Subject, threads: int) -> float:
    """Most memory of a fresh process while it makes a network and calls it, less what it held before."""
    with Worker(PROCESSES[subject.mode], shelf, threads) as worker:
        return worker.ask("peak", subject)["peak_mb"]
