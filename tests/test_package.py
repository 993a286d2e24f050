"""The package as a whole: what it costs to import, when its models join timm, and who may import whom."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vmamba

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "vmamba"

# A room may import those before it, never those after it; rooms of one line do not know each other.
FLOORS = [{"errors", "files", "lazy"}, {"ops"}, {"nn"}, {"models"}, {"data"}, {"tasks"}, {"cli"}]
HEAVY = {"torch", "timm", "numpy", "PIL", "lightning", "pytorch_lightning", "matplotlib", "torchmetrics", "datasets"}


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(code: str) -> set[str]:
    listing = "import sys, json; sys.stdout = sys.__stdout__; print(json.dumps([*sys.modules]))"
    return {name.partition(".")[0] for name in json.loads(run_python(f"{code}\n{listing}").splitlines()[-1])}


def test_importing_brings_in_nothing_heavy_before_a_name_is_used():
    assert not modules_after("import vmamba; dir(vmamba); vmamba.__version__; hasattr(vmamba, 'nothing')") & HEAVY
    assert modules_after("import vmamba; vmamba.selective_scan") & HEAVY == {"torch", "numpy"}
    after = modules_after("from vmamba import *; create_model('vmamba_femto_s2')")
    assert after >= {"torch", "timm"}
    assert not after & {"lightning", "pytorch_lightning", "matplotlib", "torchmetrics", "jsonargparse", "datasets"}


@pytest.mark.parametrize("arguments", [[], ["train"], ["validate"], ["predict"], ["explain"], ["models"], ["info"]])
def test_help_brings_in_nothing_heavy(arguments, tmp_path):
    code = (
        f"import io, os, sys, vmamba.cli; os.chdir({str(tmp_path)!r}); sys.stdout = text = io.StringIO()\n"
        f"try: vmamba.cli.main({[*arguments, '--help']})\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert 'usage: vmamba' in text.getvalue()"
    )
    assert not modules_after(code) & HEAVY


def test_importing_and_help_take_less_time_than_importing_timm():
    """Medians of fresh processes that take turns, so that a busy machine slows them all."""
    commands = {
        "timm": ["-c", "import timm"],
        "vmamba": ["-c", "import vmamba"],
        "help": ["-m", "vmamba.cli", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(3):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    assert median["vmamba"] < 0.5 * median["timm"]
    assert median["help"] < 0.7 * median["timm"]


def test_public_names_exist_and_are_documented():
    assert set(vmamba.__all__) <= set(dir(vmamba))
    for name in vmamba.__all__:
        value = getattr(vmamba, name)
        assert value.__doc__, name
        assert pickle.loads(pickle.dumps(value)) is value
    assert vmamba.nn.SS2D is not None
    with pytest.raises(AttributeError, match="module 'vmamba' has no attribute 'nothing'"):
        vmamba.nothing  # noqa: B018


def test_a_function_that_has_the_name_of_its_module_stays_a_function():
    run_python(
        "import vmamba.explain.stage_maps; from vmamba.explain.activation_maps import maps_of\n"
        "from vmamba import explain\n"
        "assert callable(explain.stage_maps) and callable(explain.activation_maps)\n"
        "for name in explain.__all__: assert getattr(explain, name).__doc__, name"
    )


# --- joining timm ----------------------------------------------------------------------------------------------------

KNOWN = "assert timm.is_model('vmamba_femto_s2'); assert timm.create_model('vmamba_femto_s2').variant"


@pytest.mark.parametrize(
    "imports",
    [
        "import timm, vmamba",
        "import vmamba, timm",
        "import vmamba; from timm.layers import DropPath; import timm",
        "import vmamba.ops; import timm",
        "import vmamba.models.registry; import timm",
        "import vmamba; vmamba.VMamba; import timm",
        "import timm.layers, vmamba.data.transforms",
        "import vmamba, importlib, timm; importlib.reload(vmamba)",
    ],
)
def test_models_join_timm_in_whichever_order_they_are_imported(imports):
    run_python(
        f"import sys; finders = len(sys.meta_path)\n{imports}\n{KNOWN}\n"
        "assert len(sys.meta_path) == finders, sys.meta_path\n"
        "assert type(timm.__loader__) is type(timm.__spec__.loader) is type(timm.layers.__loader__)"
    )


def test_models_join_timm_in_whichever_thread_it_is_imported():
    code = """
import sys, threading, time
sys.setswitchinterval(1e-5)
def load(name):
    start.wait()
    for _ in range(100):
        try:
            __import__(name)
            return
        # Threads that import a package and a part of it at once may block each other. Python ends one by an error, or
        # shows it a module that is half there.
        except BaseException as error:
            failure = error
            is_half = isinstance(error, ImportError) and "partially initialized" in str(error)
            if not (isinstance(error, RuntimeError) or is_half):
                break
            time.sleep(0.05)
    failures.append(failure)
start, failures = threading.Barrier(4), []
threads = [threading.Thread(target=load, args=[name]) for name in ("timm", "vmamba", "timm.layers", "vmamba.nn")]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
import timm
"""
    run_python(code + KNOWN)


def test_a_failing_import_of_timm_stays_what_it_is(tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise OSError('this timm is broken')")
    code = f"""
import sys, vmamba
sys.path.insert(0, {str(tmp_path)!r})
try:
    import timm
except OSError as error:
    assert str(error) == "this timm is broken"
else:
    raise AssertionError
assert "timm" not in sys.modules and "torch" not in sys.modules
sys.path.pop(0)
import timm
"""
    run_python(code + KNOWN)


# --- who imports whom ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    def floor(room: str) -> int | None:
        return next((i for i, rooms in enumerate(FLOORS) if room in rooms), None)

    own = floor(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    if own is None:  # vmamba/__init__.py, the public face
        return
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            parts = name.split(".")
            other = floor(parts[1]) if parts[0] == "vmamba" and len(parts) > 1 else None
            assert other is None or other <= own, f"{name} is above {path.name}"


def test_no_two_files_import_each_other():
    """Not in a circle of many files either, and not from inside a function."""

    def name_of(path: Path) -> str:
        return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")

    paths = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    graph = {}
    for name, path in paths.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                modules = {f"{node.module}.{alias.name}" for alias in node.names} & {*paths}
                graph[name] |= modules or {node.module} & {*paths} - {name, "vmamba"}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_every_error_of_ours_is_a_vmamba_error():
    from vmamba import errors

    ours = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(ours) > 8
    assert all(issubclass(error, errors.VmambaError) for error in ours)
    assert (errors.in_one_line(ValueError("one\n two")), errors.first_line(ValueError("\none\ntwo"))) == (
        "one two",
        "one",
    )
    assert errors.in_one_line(KeyError()) == errors.first_line(KeyError()) == "KeyError"
    with (
        pytest.raises(ImportError, match=r'^figures need one more package \(no x\): pip install "vmamba\[explain\]"$'),
        errors.needing("explain", "figures need one more package"),
    ):
        raise ImportError("no x")
