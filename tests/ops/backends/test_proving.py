"""Whether the Triton kernels are chosen on a GPU: only after a comparison, whatever befalls that."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from scans import ss2d_arguments

from vmamba.ops import ss2d_scan
from vmamba.ops.backends import choose_backend, eager, proving, triton, use_backend
from vmamba.ops.routes import SEQUENCE

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FLOAT = torch.float32
interpreted = pytest.mark.skipif(triton.unavailable(CPU) is not None, reason=str(triton.unavailable(CPU)))
ON_SMALL_GRIDS = "from vmamba.ops.backends import proving, triton; proving._GRIDS = ((2, 3, 16, 1, 2),); "


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(proving, "_verdicts", {})
    monkeypatch.setattr(proving, "_GRIDS", ((2, 3, 16, 2, 3),))
    monkeypatch.setattr(proving, "_processes", lambda: 1)
    small = triton.Configuration(4, 16, 1)
    with triton.use_configurations(triton.Configurations(small, small)):
        yield


def program(monkeypatch, code):
    """What runs in the place of the comparison; the number of times that it did."""
    monkeypatch.setattr(proving, "_PROGRAM", f"open('runs', 'a').write('x'); {code}")
    return lambda: len(open("runs").read())


def agrees(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return program(monkeypatch, """print('{"fault": "", "lasts": true}')""")


# --- the comparison --------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("pattern", "dtype"), [("cross", torch.bfloat16), (SEQUENCE, FLOAT), (None, FLOAT)])
def test_right_kernels_agree(pattern, dtype):
    assert proving.compare(CPU, dtype, pattern or proving._NO_GRID) == ""


def _spoilt(function, index, spoil):
    def call(*arguments):
        results = function(*arguments)
        if isinstance(results, torch.Tensor):
            return spoil(results)
        return tuple(spoil(value) if i == index else value for i, value in enumerate(results))

    return call


@interpreted
@pytest.mark.parametrize(
    ("name", "index", "spoil", "fault"),
    [
        ("ss2d_scan", 0, lambda y: y * 1.001, "y is off by 1.0e-03"),
        ("ss2d_scan", 0, lambda y: y / 0, "y is off by"),  # infinite or not a number
        ("ss2d_scan_backward", 4, lambda grad: grad.flip(0), "the gradient of A is off by"),
        ("ss2d_scan_backward", 1, lambda grad: grad * torch.nan, "the gradient of projected is off by nan"),
    ],
)
def test_what_differs_is_named(monkeypatch, name, index, spoil, fault):
    monkeypatch.setattr(triton, name, _spoilt(getattr(triton, name), index, spoil))
    assert proving.compare(CPU, FLOAT, "cross").startswith(fault)


@interpreted
@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("LN_2", 0.7, "y is off by"),
        ("LOG2_E", float("nan"), "y is off by nan"),
        ("_add_part", None, "the comparison failed"),
    ],
)
def test_kernels_that_are_wrong_themselves(monkeypatch, capsys, name, value, fault):
    from vmamba.ops.backends.triton import kernels

    def fails(*arguments):
        raise ValueError("the comparison failed")

    monkeypatch.setattr(kernels, name, fails if value is None else value)
    proving.main("cpu", "float32", "cross")
    assert fault in json.loads(capsys.readouterr().out)["fault"]


@interpreted
def test_every_plan_is_compared(monkeypatch):
    from vmamba.ops.backends.triton import launch

    monkeypatch.setattr(proving, "_GRIDS", ((3, 5, 16, 1, 2),))
    for layer in ("convolution", "normalisation", "products"):
        monkeypatch.setattr(proving, f"_compare_{layer}", lambda *_: "")
    carry, pair = launch._carry, launch._pair

    def wrong(length, spoilt, problem, kind, axis, *gradients):
        carries = carry(problem, kind, axis, *gradients)
        if (axis.of_gradient["length"] > 1) == (length == "long"):
            spoilt.append(axis)
            return carries._replace(local=carries.local + 0.5)
        return carries

    assert proving.compare(CPU, FLOAT, "cross") == ""
    for share, length in enumerate(("short", "long")):  # each share is one plan
        spoilt: list[object] = []
        monkeypatch.setattr(launch, "_carry", partial(wrong, length, spoilt))
        assert proving.compare(CPU, FLOAT, "cross", share, 3).endswith(f"by the plan '{length}'")
        assert spoilt
    monkeypatch.setattr(launch, "_carry", carry)
    monkeypatch.setattr(launch, "_pair", lambda *given: tuple(reversed(pair(*given) or ())))
    launch._axes.cache_clear()
    assert proving.compare(CPU, FLOAT, "cross", 2, 3).endswith("by the plan 'walk'")
    launch._axes.cache_clear()


def test_an_exception_is_a_verdict(monkeypatch, capsys):
    def fails(arguments):
        raise RuntimeError("PassManager::run failed\nmodule { ... }")

    monkeypatch.setattr(triton, "ss2d_scan", fails)
    proving.main("cpu", "float32", "cross")
    assert json.loads(capsys.readouterr().out) == {"fault": "RuntimeError: PassManager::run failed", "lasts": True}


@pytest.mark.parametrize(
    ("said", "lasts"),
    [
        ("CUDA error: out of memory", False),
        ("Triton Error [CUDA]: out of memory", False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False),
        ("GET was unable to find an engine to execute this computation", False),
        ("out of resource: shared memory, Required: 300000", True),
    ],
)
def test_a_card_that_is_full_says_nothing_of_the_kernels(monkeypatch, capsys, said, lasts):
    def fails(*given):
        raise RuntimeError(said)

    monkeypatch.setattr(proving, "compare", fails)
    proving.main("cpu", "float32", "cross")
    assert json.loads(capsys.readouterr().out) == {"fault": f"RuntimeError: {said}", "lasts": lasts}


# --- the process around it -------------------------------------------------------------------------------------------


@interpreted
def test_proven_once_for_all_processes(monkeypatch):
    monkeypatch.setattr(proving, "_PROGRAM", f"{ON_SMALL_GRIDS} import sys; proving.main(*sys.argv[1:])")
    assert proving.is_proven(CPU, FLOAT, "unidirectional")
    (file,) = proving.cache_folder().glob("*.json")
    about = json.loads(file.read_text())
    assert about["fault"] == ""
    assert about["pattern"] == "unidirectional"
    monkeypatch.setattr(proving, "_verdicts", {})  # another process
    monkeypatch.setattr(proving, "_PROGRAM", "raise SystemExit('asked again')")
    assert proving.is_proven(CPU, FLOAT, "unidirectional")


@interpreted
@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("""print('{"fault": "y is off by 0.5", "lasts": true}')""", "y is off by 0.5"),
        # A compiler or a kernel that crashes in the midst of it.
        (
            f"{ON_SMALL_GRIDS} import os, sys; from vmamba.ops.backends.triton import launch; "
            "launch._launch = lambda *given, **named: os.abort(); proving.main(*sys.argv[1:])",
            "the comparison was ended by signal 6",
        ),
        ("import sys; sys.exit('ptxas: no such instruction')", r"the comparison failed \(1\): ptxas: no such"),
        ("print('good morning')", r"the comparison failed \(0\)"),
        ("print('[1]')", r"the comparison failed \(0\)"),
        ("import time; time.sleep(60)", "the comparison did not end in 0.5 seconds"),
    ],
)
def test_doubt_leaves_the_kernels_off_and_says_so_once(monkeypatch, tmp_path, code, fault):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(proving, "_PATIENCE", 0.5 if "sleep" in code else 60)
    count = program(monkeypatch, code)
    with pytest.warns(UserWarning, match=f"not used for float32 and cross on .*: {fault}.*report.*delete it"):
        assert not proving.is_proven(CPU, FLOAT, "cross")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not proving.is_proven(CPU, FLOAT, "cross")
    assert count() == 1


@interpreted
@pytest.mark.parametrize(
    "code",
    [
        "import os; os.kill(os.getpid(), 9)",
        "proving.compare = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError('on the card')); "
        "proving.main('cpu', 'float32', 'cross')",
        "proving.compare = lambda *_: (_ for _ in ()).throw(RuntimeError('CUDA-capable device(s) is/are busy or "
        "unavailable')); proving.main('cpu', 'float32', 'cross')",
    ],
    ids=["killed", "memory", "busy"],
)
def test_what_says_nothing_of_the_kernels_is_not_kept(monkeypatch, tmp_path, code):
    monkeypatch.chdir(tmp_path)
    count = program(monkeypatch, f"import torch; from vmamba.ops.backends import proving; {code}")
    for runs in (1, 2):  # as two processes would
        monkeypatch.setattr(proving, "_verdicts", {})
        with pytest.warns(UserWarning, match="not used for float32.*The next process tries again"):
            assert not proving.is_proven(CPU, FLOAT, "cross")
        assert not proving.is_proven(CPU, FLOAT, "cross")
        assert count() == runs
    agrees(monkeypatch, tmp_path)
    monkeypatch.setattr(proving, "_verdicts", {})
    assert proving.is_proven(CPU, FLOAT, "cross")


def test_a_user_without_a_home_keeps_no_verdicts(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("could not determine home directory")))
    count = agrees(monkeypatch, tmp_path)
    assert proving.is_proven(CPU, FLOAT, "cross")
    assert count() == 1
    assert not [*tmp_path.rglob("*.json")]


@interpreted
def test_shares_make_the_whole(monkeypatch):
    """Every scan is compared once by every plan, whatever the number of processes."""
    monkeypatch.setattr(proving, "_GRIDS", ((2, 3, 16, 1, 2), (1, 4, 16, 1, 1)))
    seen = []
    monkeypatch.setattr(triton, "use_plan", lambda plan: seen.append(plan) or nullcontext())
    for name in ("ss2d_scan", "ss2d_scan_backward"):
        monkeypatch.setattr(triton, name, getattr(eager, name))
    for shares in (1, 3, 4):
        seen.clear()
        assert not any(proving.compare(CPU, FLOAT, "cross", share, shares) for share in range(shares))
        assert sorted(seen) == ["long"] * 4 + ["short"] * 4 + ["walk"] * 2  # two scans, forward and backward


@interpreted
@pytest.mark.parametrize("share", [0, 2])
def test_a_fault_in_any_of_the_processes_counts(monkeypatch, tmp_path, share):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(proving, "_processes", lambda: 3)
    count = program(
        monkeypatch,
        f"import json, sys; print(json.dumps({{'fault': 'y is off' * (sys.argv[4] == '{share}'), 'lasts': True}}))",
    )
    with pytest.warns(UserWarning, match="y is off.*delete it"):
        assert not proving.is_proven(CPU, FLOAT, "cross")
    assert 1 <= count() <= 3  # the others are ended where they are


@interpreted
def test_where_there_is_no_room_for_several_one_proves_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(proving, "_processes", lambda: 3)
    count = program(
        monkeypatch,
        "import json, sys; print(json.dumps({'fault': 'out of memory' * (sys.argv[5] == '3'), 'lasts': False}))",
    )
    assert proving.is_proven(CPU, FLOAT, "cross")
    assert count() == 4


@interpreted
def test_a_cache_that_cannot_be_written_or_read(monkeypatch, tmp_path):
    count = agrees(monkeypatch, tmp_path)
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert proving.is_proven(CPU, FLOAT, "cross")
    assert proving.is_proven(CPU, FLOAT, "cross")
    assert count() == 1  # known for the rest of this process
    (tmp_path / "cache").unlink()
    monkeypatch.setattr(proving, "_verdicts", {})
    assert proving.is_proven(CPU, FLOAT, "cross")
    (file,) = proving.cache_folder().glob("*.json")
    file.write_text("{half of a verd")
    monkeypatch.setattr(proving, "_verdicts", {})
    assert proving.is_proven(CPU, FLOAT, "cross")
    assert count() == 3


@interpreted
def test_two_processes_at_once_compare_once(monkeypatch, tmp_path):
    agrees(monkeypatch, tmp_path)
    slow = f"import time; time.sleep(2); {proving._PROGRAM}"
    code = f"""
import torch
from vmamba.ops.backends import proving
proving._PROGRAM, proving._processes = {slow!r}, lambda: 1
print(proving.is_proven(torch.device("cpu"), torch.float32, "cross"))
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["True", "True"]
    assert (tmp_path / "runs").read_text() == "x"


@interpreted
def test_other_circumstances_are_proven_anew(monkeypatch, tmp_path):
    count = agrees(monkeypatch, tmp_path)
    asked = [(FLOAT, "cross"), (torch.bfloat16, "cross"), (FLOAT, "bidirectional"), (FLOAT, None)]
    for _ in range(2):
        assert all(proving.is_proven(CPU, *each) for each in asked)
    assert count() == 4
    monkeypatch.setattr(proving, "_verdicts", {})
    known = proving._circumstances(CPU)
    monkeypatch.setattr(proving, "_circumstances", lambda device: known | {"driver": "the next one"})
    assert proving.is_proven(CPU, FLOAT, "cross")
    assert count() == 5


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def _a_gpu(monkeypatch):
    monkeypatch.delenv("VMAMBA_BACKEND", raising=False)
    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    from vmamba.ops.backends import BACKENDS

    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"].__class__(**{
        **vars(BACKENDS["triton"]), "unavailable": lambda device: None if device.type == "cuda" else "no GPU"
    }))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.usefixtures("_a_gpu")
def test_proven_kernels_are_the_default_on_a_gpu(monkeypatch):
    monkeypatch.setattr(proving, "_look_up_or_prove", lambda device, dtype, pattern: dtype == torch.bfloat16)
    assert choose_backend(None, GPU, torch.bfloat16, "cross").name == "triton"
    assert choose_backend(None, GPU, FLOAT, "cross").name == "eager"
    assert choose_backend(None, GPU, torch.float64, "cross").name == "eager"
    with use_backend("triton"):
        assert choose_backend(None, GPU, FLOAT, "cross").name == "triton"
    with use_backend("eager"):
        assert choose_backend(None, GPU, torch.bfloat16, "cross").name == "eager"
    monkeypatch.setenv("VMAMBA_BACKEND", "eager")
    assert choose_backend(None, GPU, torch.bfloat16, "cross").name == "eager"


@pytest.mark.parametrize(
    ("pattern", "dtype", "asked"),
    [
        ("bidirectional", torch.bfloat16, (torch.bfloat16, "bidirectional")),
        ("diagonal", torch.bfloat16, (FLOAT, SEQUENCE)),  # taken apart into float32 sequences
    ],
)
def test_what_the_operator_asks_for(monkeypatch, pattern, dtype, asked):
    questions = []

    def ask(argument, device, *question):
        questions.append(question)
        return choose_backend("eager", device)

    monkeypatch.setattr(sys.modules["vmamba.ops.ss2d"], "choose_backend", ask)
    u, *others = ss2d_arguments(1, 3, 4, 2, 1, 1)
    ss2d_scan(u.to(dtype), *others, pattern=pattern)
    assert questions == [asked]


@pytest.mark.usefixtures("_a_gpu")
def test_nothing_is_proven_while_a_graph_is_captured(monkeypatch):
    proofs = []
    monkeypatch.setattr(proving, "_look_up_or_prove", lambda *key: proofs.append(key) or True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose_backend(None, GPU, FLOAT, "cross").name == "eager"
    assert not proofs
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose_backend(None, GPU, FLOAT, "cross").name == "triton"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose_backend(None, GPU, FLOAT, "cross").name == "triton"
    assert len(proofs) == 1


@interpreted
@pytest.mark.parametrize("verdict", [True, False])
def test_a_compiled_graph_holds_the_answer_not_the_question(monkeypatch, verdict):
    torch._dynamo.reset()
    proofs = []
    monkeypatch.setattr(proving, "_look_up_or_prove", lambda *key: proofs.append(key) or verdict)
    compiled = torch.compile(
        lambda x: x + 1 if proving.is_proven(x.device, x.dtype, "cross") else x - 1, fullgraph=True, backend="eager"
    )
    for _ in range(2):
        assert torch.equal(compiled(torch.zeros(3)), torch.full((3,), 1.0 if verdict else -1.0))
    assert proofs == [(CPU, FLOAT, "cross")]
