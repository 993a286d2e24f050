"""Int8 beside float32 and bfloat16: accuracy, size of the file, and time on this CPU.

    python benchmarks/quantize.py --processor-time                          # on one thread
    OMP_NUM_THREADS=2 python benchmarks/quantize.py                         # on two, while nothing else runs
    python benchmarks/quantize.py --colour MODEL FOLDER                     # a second model and its pictures in colour
    python benchmarks/quantize.py --sections layers                         # what each kind of layer costs and gains
    python benchmarks/quantize.py --sections dense --processor-time         # segmentation and detection

The first model is the demo's, which `make demo` trains; those of the section `dense` are of `make demo-dense`. FOLDER
holds train and val, each a folder or a .tar file of class folders.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import openvino
import torch
from page import Row
from runner import RESULTS, Bench, Benchmark, Figures, Part, Results, Section, Settings, Tables
from torch import Tensor, nn

import vmamba
from vmamba.data.coco import ObjectDataset, encode_masks, open_objects
from vmamba.data.config import DataConfig
from vmamba.data.masks import MaskedPictures, open_masks
from vmamba.data.sources import open_split
from vmamba.data.transforms import IGNORED, Preprocessing
from vmamba.deploy import export_onnx, int8_onnx, load_quantized, onnx_runtime, quantize
from vmamba.models.registry import load_model
from vmamba.tasks.detection import evaluate
from vmamba.tasks.prediction import preprocessing_of
from vmamba.tasks.segmentation import scores

ROOT = Path(__file__).parents[1]
GARMENTS = ROOT / "runs/garments"
GREY, COLOUR, LARGE = "Fashion-MNIST", "CIFAR-10", "VMamba-T"
ORT, ORT_INT8 = "ONNX Runtime, float32", "ONNX Runtime, int8"
TORCH, BFLOAT16, TORCH_INT8 = "torch, float32", "torch, bfloat16", "torch, int8"
OPENVINO = {"f32": "OpenVINO, float32", "bf16": "OpenVINO, bfloat16", "int8": "OpenVINO, int8"}
OURS = "as written"
LAYOUT = {
    "accuracy": ("Accuracy", "data;form;accuracy, %;loss, points;same decisions, %;MB"),
    "times": ("VMamba-T, one image of 224²", "form;ms;MB"),
    "dense": ("Garments on floors and cloths, one picture of 256×320", "model;form;mIoU, %;box AP, %;mask AP, %;ms;MB"),
    "layers": ("What else in int8 costs and gains", "int8 as well;model;loss, points;difference, %;ms"),
}
FOLDER = tempfile.TemporaryDirectory()
Call = Callable[[np.ndarray], np.ndarray]
Whole = Callable[[np.ndarray], list[np.ndarray]]  # all outputs


@dataclass
class Subject:
    """A trained model and its pictures."""

    file: Path
    data: DataConfig

    @cached_property
    def model(self) -> tuple[nn.Module, dict[str, Any]]:
        return load_model(self.file)

    @cached_property
    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (N, C, H, W) and labels of the whole validation split."""
        model, metadata = self.model
        pre = preprocessing_of(model, None, metadata)
        split, transform = open_split(self.data, False, metadata.get("class_names")), pre.eval_transform()
        images, labels = zip(*(split.read(index, pre.in_chans) for index in range(len(split))), strict=True)
        return pre.normalise(torch.stack([transform(image) for image in images])).numpy(), np.array(labels)

    def outputs(self, call: Call) -> np.ndarray:
        images, _ = self.test
        return np.concatenate([call(images[start : start + 100]) for start in range(0, len(images), 100)])


SUBJECTS: dict[str, Subject] = {}


def path(name: str) -> Path:
    return Path(FOLDER.name) / name


@cache
def large() -> nn.Module:
    """Of random weights: its time is that of a trained one."""
    torch.manual_seed(0)
    return vmamba.create_model("vmamba_tiny_s1l8").eval()


@cache
def whole(name: str) -> Path:
    """The float32 ONNX file."""
    model, metadata = (large(), {}) if name == LARGE else SUBJECTS[name].model
    return export_onnx(model, path(f"{name}.onnx"), class_names=metadata.get("class_names")).path


def pictures(name: str) -> Any:
    """To calibrate with: the training split's; of the large model noise, for only its time is looked at."""
    if name == LARGE:
        return list(torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    return open_split(SUBJECTS[name].data, True)


def outputs_in_onnx(file: Path, threads: int) -> Whole:
    return onnx_runtime.runner(file, threads, spins=False)  # while others have their turn


def in_onnx(file: Path, threads: int) -> Call:
    call = outputs_in_onnx(file, threads)
    return lambda images: call(images)[0]


def in_openvino(file: Path, precision: str, threads: int) -> Call:
    """For one image of 224²."""
    core = openvino.Core()
    graph = core.read_model(file)
    graph.reshape([1, 3, 224, 224])
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
    request = core.compile_model(graph, "CPU", settings).create_infer_request()
    return lambda images: request.infer([images])[0]


def in_torch(model: Callable[[Tensor], Tensor], low: bool = False) -> Call:
    def call(images: np.ndarray) -> np.ndarray:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            return model(torch.from_numpy(images)).float().numpy()

    return call


def forms(name: str, threads: int, timed: bool) -> Iterator[tuple[str, Call, int | None]]:
    """The model in each form, with the bytes of its file; to be timed, also those that are for speed alone."""
    model = large() if name == LARGE else SUBJECTS[name].model[0].eval()
    noise = {"samples": 6, "held_back": 2, "tolerance": 1.0} if name == LARGE else {}
    yield ORT, in_onnx(whole(name), threads), whole(name).stat().st_size
    file = quantize(whole(name), path(f"{name}-int8.onnx"), pictures(name), **noise).path
    yield ORT_INT8, in_onnx(file, threads), file.stat().st_size
    if timed:
        for precision, form in OPENVINO.items():
            read = file if precision == "int8" else whole(name)
            yield form, in_openvino(read, precision, threads), read.stat().st_size
    size = 4 * sum(p.numel() for p in model.parameters())
    yield TORCH, in_torch(model), size
    yield BFLOAT16, in_torch(model, low=True), size // 2
    file = quantize(model, path(f"{name}.pt2"), pictures(name), format="torch", **noise).path
    program: Any = load_quantized(file)[0]
    if timed:
        torch._inductor.config.freezing = True
        program = torch.compile(program)
    yield TORCH_INT8, in_torch(program), file.stat().st_size


def accuracy(bench: Bench) -> Iterator[Part]:
    """Every form on the whole test set."""
    for name, subject in SUBJECTS.items():
        _, labels = subject.test
        wanted = None
        for form, call, size in forms(name, torch.get_num_threads(), timed=False):
            found = subject.outputs(call)
            wanted = found if wanted is None else wanted
            same = (found.argmax(1) == wanted.argmax(1)).mean()
            score, before = ((outputs.argmax(1) == labels).mean() for outputs in (found, wanted))
            row: Row = {"data": name, "form": form, "accuracy": float(score), "bytes": size}
            row |= {"points": 100 * float(before - score), "loss, points": f"{100 * (before - score):.2f}"}
            yield "accuracy", [row | {"same decisions, %": f"{100 * same:.2f}"}]


def turns(bench: Bench, calls: dict[str, Call]) -> dict[str, float]:
    """Median seconds of one picture of 224² through each, in turns."""
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    return bench.interleave({form: partial(call, image) for form, call in calls.items()})


def times(bench: Bench) -> Iterator[Part]:
    """Every form of VMamba-T."""
    found = list(forms(LARGE, torch.get_num_threads(), timed=True))
    seconds = turns(bench, {form: call for form, call, _ in found})
    yield "times", [{"form": form, "seconds": seconds[form], "bytes": size} for form, _, size in found]


def segmented(call: Whole, pictures: MaskedPictures) -> Row:
    """How well a file segments."""
    number = len(pictures.class_names)
    counts = np.zeros(number**2, np.int64)
    for index in range(len(pictures)):
        picture, labels = (value.as_subclass(Tensor) for value in pictures.read(index))
        found, known = call(in_network(picture))[0].argmax(1)[0], (labels != IGNORED).numpy()
        counts += np.bincount(labels.numpy()[known].astype(int) * number + found[known], minlength=len(counts))
    return {"mIoU": scores(counts.reshape(number, number))["mIoU"]}


def detected(call: Whole, pictures: ObjectDataset) -> Row:
    """How well a file detects."""
    entries = []
    for index, about in enumerate(pictures.pictures):
        boxes, confidences, labels, _, masks = call(in_network(pictures.read(index)[0].as_subclass(Tensor)))
        boxes[:, 2:] -= boxes[:, :2]
        columns = boxes.tolist(), confidences.tolist(), labels, encode_masks(masks)
        entries += [
            {"image_id": about["id"], "category_id": pictures.category_ids[label], "bbox": box, "score": score,
             "segmentation": mask} for box, score, label, mask in zip(*columns, strict=True)
        ]  # fmt: skip
    box, mask = (float(evaluate(pictures, entries, kind).numbers[0]) for kind in ("box", "mask"))
    return {"AP": box, "mask AP, %": f"{100 * mask:.2f}"}


def in_network(picture: Tensor) -> np.ndarray:
    """uint8 (3, H, W) as a batch of one, normalised."""
    return Preprocessing().normalise(picture[None]).numpy()


def dense(bench: Bench) -> Iterator[Part]:
    """The models of the demo of segmentation and detection, on its validation split, in ONNX Runtime."""
    tasks: tuple[tuple[str, Any, Callable[..., Row]], ...] = (
        ("segmentation", open_masks(GARMENTS, "val"), segmented),
        ("detection", open_objects(GARMENTS / "val.json", GARMENTS / "images"), detected),
    )
    for task, known, measure in tasks:
        model, metadata = load_model(f"{GARMENTS}_{task}/model.safetensors")
        files = [export_onnx(model, path(f"{task}.onnx"), class_names=metadata["class_names"]).path]
        files.append(quantize(files[0], path(f"{task}-int8.onnx"), GARMENTS / "images/train").path)
        calls = {
            form: outputs_in_onnx(file, torch.get_num_threads())
            for form, file in zip((ORT, ORT_INT8), files, strict=True)
        }
        image = in_network(known.read(0)[0].as_subclass(Tensor))
        seconds = bench.interleave({form: partial(call, image) for form, call in calls.items()})
        for (form, call), file in zip(calls.items(), files, strict=True):
            row: Row = {"model": metadata["variant"], "form": form, "seconds": seconds[form]}
            yield "dense", [row | {"bytes": file.stat().st_size} | measure(call, known)]


def layers(bench: Bench) -> Iterator[Part]:
    """Other choices of what computes in int8, in ONNX Runtime."""
    threads, rule = torch.get_num_threads(), int8_onnx.computes_in_int8
    choices: dict[str, Callable[..., bool]] = {
        OURS: rule,
        "depthwise convolutions": lambda layer, kind, weight, *rest: (
            (len(weight) > 2 and weight[1] == 1) or rule(layer, kind, weight, *rest)
        ),
        "the stem's first convolution": lambda layer, kind, weight, *rest: (
            layer == "stem.conv1" or rule(layer, kind, weight, *rest)
        ),
        "projections to Δ, B and C": lambda layer, kind, weight, *rest: (
            kind.endswith("SS2D") or rule(layer, kind, weight, *rest)
        ),
        "all of these": lambda *arguments: True,
        "but without the head": lambda layer, *rest: not layer.startswith("head") and rule(layer, *rest),
    }
    calls: dict[str, Call] = {}
    for choice, chosen in choices.items():
        with mock.patch.object(int8_onnx, "computes_in_int8", chosen):
            for name in [*SUBJECTS, LARGE]:
                noise = {"samples": 6, "held_back": 2, "tolerance": 1.0} if name == LARGE else {}
                file = path("layers.onnx") if name != LARGE else path(f"layers-{len(calls)}.onnx")
                written = quantize(whole(name), file, pictures(name), **noise)
                call = in_onnx(file, threads)
                if name == LARGE:
                    calls[choice] = call
                    continue
                _, labels = SUBJECTS[name].test
                before, after = (SUBJECTS[name].outputs(each) for each in (in_onnx(whole(name), threads), call))
                loss = 100 * ((before.argmax(1) == labels).mean() - (after.argmax(1) == labels).mean())
                row: Row = {"int8 as well": choice, "model": name, "loss, points": f"{loss:.2f}"}
                yield "layers", [row | {"difference, %": f"{100 * written.mean:.2f}"}]
    for choice, seconds in turns(bench, calls).items():
        yield "layers", [{"int8 as well": choice, "model": LARGE, "seconds": seconds}]


def figures(tables: Tables, settings: Settings) -> list[Row]:
    found = Figures(tables)

    def loss(name: str, form: str) -> tuple[float, str]:
        return found.find("accuracy", key="points", data=name, form=form)["points"], "of top-1 accuracy"

    def seconds(form: str) -> float:
        return found.find("times", form=form)["seconds"]

    for name in SUBJECTS:
        for form in (ORT_INT8, TORCH_INT8):
            found.add(f"{name}: {form}, loss in points", 0.3, partial(loss, name, form))
    for form in (ORT_INT8, TORCH_INT8):
        found.add(f"{form} / {ORT}", 0.6, lambda form=form: (seconds(form) / seconds(ORT), "time of VMamba-T"))
    found.add(f"{TORCH_INT8} / {BFLOAT16}", 1.0, lambda: (seconds(TORCH_INT8) / seconds(BFLOAT16), "time of VMamba-T"))
    return found.records


def notes(settings: Settings) -> list[str]:
    clock = "processor time, one thread," if "clock" in settings.options else "time"
    return [
        f"Post-training: 128 pictures of the training split to calibrate with; accuracy on the whole test set, loss "
        f"against {ORT}",
        f"{clock.capitalize()} in turns, medians; torch in int8 compiled by inductor, in bfloat16 under autocast; "
        "OpenVINO for one size",
        f"ONNX Runtime {onnxruntime.__version__}, OpenVINO {openvino.__version__.split('-')[0]}",
    ]


QUANTIZE = Benchmark(
    "quantize", "Int8", LAYOUT,
    {
        "accuracy": Section(accuracy, ("accuracy",)),
        "times": Section(times, ("times",)),
        "dense": Section(dense, ("dense",)),
        "layers": Section(layers, ("layers",)),
    },
    figures, "none", notes,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs/demo/model.safetensors", help="the demo's model")
    parser.add_argument("--colour", nargs=2, metavar=("MODEL", "FOLDER"), help="a model of CIFAR-10 and its pictures")
    parser.add_argument("--sections", nargs="+", choices=QUANTIZE.sections, default=["accuracy", "times"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--processor-time", action="store_true", help="on one thread; other programs on the machine hardly touch it"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    if not options.model.exists():
        parser.error(f"{options.model} is not there: `make demo` trains it")
    SUBJECTS[GREY] = Subject(options.model, DataConfig(root=str(ROOT / "examples"), dataset="torch/fashion_mnist"))
    if options.colour:
        SUBJECTS[COLOUR] = Subject(Path(options.colour[0]), DataConfig(root=options.colour[1]))
    if options.processor_time:
        torch.set_num_threads(1)
    settings = Settings("cpu", rounds=options.rounds, options={"clock": {}} if options.processor_time else {})
    results = Results(QUANTIZE, settings, options.output)
    clock = time.process_time if options.processor_time else time.perf_counter
    results.run(Bench(settings, clock=clock), options.sections)
    print(results.page)


if __name__ == "__main__":
    main()
