"""Every command and snippet of the documentation, run as a reader would, but in one process and on small things."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from models.test_authors_options import authors_shapes
from test_readme import COMMANDS, desk  # noqa: F401

import vmamba
from vmamba import cli
from vmamba.models.checkpoints import save_checkpoint

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    page for page in DOCS.glob("*.md") if page.stem not in ("kernels", "patterns", "deployment", "serving", "batch")
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def named(page: Path) -> str:
    return page.stem


@pytest.fixture(scope="module")
def table(desk: Path) -> Path:  # noqa: F811
    """The README's desk, and what the documentation speaks of beside it."""
    model = vmamba.create_model("vmamba_femto_s2", in_chans=3, num_classes=3)
    for path in (desk / "model.safetensors", desk / "runs/latest/model.safetensors"):
        save_checkpoint(model, path)
    shapes = authors_shapes([1, 2, 1], 24, 5, 7, ssm_d_state=1, ssm_conv_bias=False, forward_type="v05_noz",
                            downsample_version="v3", patchembed_version="v2")  # fmt: skip
    torch.save({"model": {name: torch.zeros(shape) for name, shape in shapes.items()}}, desk / "vssm.pth")
    return desk


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=named)
def test_snippets(page: Path, table: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(table)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(table / "cache/hub"))
    patterns = vmamba.ops.routes.PATTERNS.copy()
    for snippet in blocks(page, "python"):
        exec(compile(snippet, str(page), "exec"), {"__name__": f"snippet of {named(page)}"})
    vmamba.ops.routes.PATTERNS.clear()
    vmamba.ops.routes.PATTERNS.update(patterns)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=named)
def test_commands(page: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(table)
    for line in "".join(blocks(page, "bash")).splitlines():
        program, *words = shlex.split(line, comments=True) or ["#"]
        if [program, *words] in COMMANDS:  # those that the README has too are run with it
            continue
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif program == "vmamba":
            assert words[0] not in ("train", "validate"), "which would take hours: only as in the README"
            assert cli.main(words) == 0, capsys.readouterr().err
        else:
            assert program == "#", line


def test_both_languages_have_the_same_code():
    for page in (DOCS / "zh").glob("*.md"):
        for language in ("python", "bash"):  # so that those of the English page need to be run alone
            theirs, ours = (
                [re.sub(r"\s*#.*", "", block) for block in blocks(each, language)] for each in (page, DOCS / page.name)
            )
            assert theirs == ours


def test_what_the_site_shows_is_there_and_small():
    shown = {DOCS / "images" / name for page in PAGES for name in re.findall(r"images/([\w.]+)\)", page.read_text())}
    assert len(shown) > 5
    for picture in shown:
        assert picture.stat().st_size < 200_000, picture


def test_the_table_of_options_is_complete():
    """Every argument of the authors' class has its row, and ours in the table exist."""
    text = (DOCS / "from-the-authors-code.md").read_text()
    theirs = [
        "patch_size", "in_chans", "num_classes", "depths", "dims", "ssm_d_state", "ssm_ratio", "ssm_dt_rank",
        "ssm_act_layer", "ssm_conv", "ssm_conv_bias", "ssm_drop_rate", "ssm_init", "forward_type", "mlp_ratio",
        "mlp_act_layer", "mlp_drop_rate", "gmlp", "drop_path_rate", "patch_norm", "norm_layer", "downsample_version",
        "patchembed_version", "use_checkpoint", "posembed", "imgsize",
    ]  # fmt: skip
    for name in theirs:
        assert re.search(rf"^\|.*`{name}\b.*\|.*\|$", text, re.MULTILINE), name
    ours = {"stem_stride", "d_state", "ssm_ratio", "conv_bias", "proj_drop_rate", "init", "gated", "pattern",
            "downsample", "stem", "img_size", "mlp_ratio", "drop_path_rate"}  # fmt: skip
    assert ours <= set(vmamba.VMamba.__init__.__annotations__)
    assert all(f"`{name}" in text for name in ours)
