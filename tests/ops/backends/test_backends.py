"""How a backend is chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scans import ss2d_arguments

from vmamba.ops import available_backends, ss2d_scan, use_backend
from vmamba.ops.backends import BACKENDS, ENVIRONMENT_VARIABLE, choose_backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_argument_wins_over_context_over_environment(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert choose_backend(None, CPU).name == "reference"
    with use_backend("eager"):
        assert choose_backend(None, CPU).name == "eager"
        assert choose_backend("reference", CPU).name == "reference"
    assert choose_backend(None, CPU).name == "reference"


def test_auto_undoes_an_outer_choice(monkeypatch):
    automatic = choose_backend(None, CPU).name
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    with use_backend("auto"):
        assert choose_backend(None, CPU).name == automatic


def test_automatic_choice_is_never_the_slow_definition():
    assert choose_backend(None, CPU).name != "reference"
    assert choose_backend(None, torch.device("meta")).name == "eager"


def test_unknown_names_say_where_they_come_from(monkeypatch):
    arguments = ss2d_arguments(1, 2, 2, 2, 1, 1)
    with pytest.raises(ValueError, match=r"the argument backend= names the backend 'fast'; expected 'auto' or one of"):
        ss2d_scan(*arguments, backend="fast")
    with pytest.raises(ValueError, match=r"use_backend\(\) names the backend 'fast'"), use_backend("fast"):
        pass
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="the environment variable VMAMBA_BACKEND names the backend 'fast'"):
        ss2d_scan(*arguments)


def test_an_unavailable_backend_says_why(monkeypatch):
    absent = dataclasses.replace(BACKENDS["eager"], name="absent", unavailable=lambda device: "it needs a unicorn")
    monkeypatch.setitem(BACKENDS, "absent", absent)
    assert available_backends()["absent"] == "it needs a unicorn"
    with pytest.raises(
        RuntimeError, match=r"backend 'absent' \(from the argument backend=\) cannot run on cpu: it needs"
    ):
        ss2d_scan(*ss2d_arguments(1, 2, 2, 2, 1, 1), backend="absent")


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch.compile cannot read a context variable before 2.14")
def test_a_compiled_graph_follows_the_context():
    arguments = ss2d_arguments(1, 2, 2, 2, 1, 1)
    chosen = []

    def record(module, inputs):
        chosen.append({str(node.args[-1]) for node in module.graph.nodes if "ss2d_scan" in str(node.target)})
        return module.forward

    compiled = torch.compile(lambda *v: ss2d_scan(*v), fullgraph=True, backend=record)
    with torch.no_grad(), use_backend("eager"):
        compiled(*arguments)
    with torch.no_grad(), use_backend("reference"):
        compiled(*arguments)
    assert chosen == [{"eager"}, set()]
