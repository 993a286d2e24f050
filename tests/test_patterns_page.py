"""docs/patterns.md: its snippets run, and make the orders that it says they make."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from vmamba.ops import PATTERNS, scan_orders

PAGE = Path(__file__).parents[1] / "docs/patterns.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the snippets define, run one after another."""
    before, defined = dict(PATTERNS), {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(snippet, str(PAGE), "exec"), defined)
        assert {path.name for path in Path.cwd().iterdir()} == {"mine.png", "both.gif"}
    yield defined
    PATTERNS.clear()
    PATTERNS.update(before)


def test_the_spiral_is_the_one_of_this_package(names):
    for size in ((1, 1), (1, 5), (4, 1), (3, 7), (8, 8), (9, 4)):
        assert torch.equal(scan_orders(names["my_spiral"], *size), scan_orders("spiral", *size))
    assert names["model"].pattern == "my spiral"


def test_the_hilbert_curve_is_the_one_of_this_package_where_neither_jumps(names):
    for side in (1, 2, 4, 8, 16):
        ours, theirs = scan_orders("hilbert", side, side), scan_orders(names["my_hilbert"], side, side)
        assert torch.equal(theirs, ours) or torch.equal(theirs[[1, 0, 3, 2]], ours)
    layer, program = names["layer"], names["program"]
    for x in (torch.randn(2, 7, 10, 8), torch.randn(2, 5, 4, 8)):
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)


def test_all_patterns_are_listed():
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    assert set(listed) == {"cross", "unidirectional", "bidirectional", "diagonal", "hilbert", "spiral"}
