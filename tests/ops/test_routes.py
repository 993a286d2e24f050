"""The four orders over a grid."""

from __future__ import annotations

import pytest
import torch

from vmamba.ops import PATTERNS, cross_merge, cross_scan, scan_orders


@pytest.mark.parametrize("pattern", ["cross", "unidirectional", "bidirectional"])
def test_golden(golden_ops, pattern):
    assert torch.equal(cross_scan(golden_ops["x"], pattern), golden_ops[f"{pattern}_scan"])
    merged = cross_merge(golden_ops["ys"], (5, 7), pattern).flatten(2)
    torch.testing.assert_close(merged, golden_ops[f"{pattern}_merge"], atol=1e-5, rtol=0)


def test_cross_reads_rows_columns_and_both_backwards():
    x = torch.arange(6).view(1, 1, 2, 3)
    rows, columns, rows_back, columns_back = cross_scan(x)[0, :, 0].tolist()
    assert rows == [0, 1, 2, 3, 4, 5]
    assert columns == [0, 3, 1, 4, 2, 5]
    assert rows_back == rows[::-1]
    assert columns_back == columns[::-1]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_orders_are_what_scan_reads(pattern):
    for height, width in ((1, 1), (1, 5), (5, 1), (3, 7), (4, 4)):
        positions = torch.arange(height * width).view(1, 1, height, width)
        orders = scan_orders(pattern, height, width)
        assert orders.dtype == torch.int64
        assert torch.equal(orders, cross_scan(positions, pattern)[0, :, 0])
        assert torch.equal(orders.sort(1).values, torch.arange(height * width).expand(4, -1))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (4, 4), (3, 7)])
def test_merge_is_the_adjoint_of_scan(pattern, size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    ys = torch.randn(2, 4, 3, size[0] * size[1], dtype=torch.float64)
    torch.testing.assert_close((cross_scan(x, pattern) * ys).sum(), (x * cross_merge(ys, size, pattern)).sum())


def test_clear_errors():
    with pytest.raises(ValueError, match=r"pattern is 'zigzag'; expected one of 'cross', 'unidirectional'"):
        cross_scan(torch.zeros(1, 1, 2, 2), "zigzag")
    with pytest.raises(ValueError, match=r"x has shape \(3, 2, 2\); expected 4 dimensions \(B, C, H, W\)"):
        cross_scan(torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match=r"ys has shape \(1, 4, 3, 8\).*grid of 3×3.*9"):
        cross_merge(torch.zeros(1, 4, 3, 8), (3, 3))
