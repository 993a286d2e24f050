"""What detection needs of ONNX beyond what torch translates: suppression, and masks put into their pictures."""

# What onnxscript compiles are no Python functions, whatever a type checker takes them for.
# mypy: ignore-errors
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import BOOL, FLOAT, graph, script, values
from onnxscript import opset18 as op

import vmamba.deploy.detection  # noqa: F401  # the operators

_FUNCTIONS = values.Opset("vmamba", 1)


@script(_FUNCTIONS)
def paste_masks(probabilities: FLOAT[...], boxes: FLOAT[...], images: FLOAT[...]) -> BOOL[...]:
    """`boxes.paste_masks`: (n, h, w) in (n, 4) to (n, H, W), one mask at a time.

    Bilinear sampling is a product with two matrices of triangular weights, of rows and of columns.
    """
    zero = op.Constant(value_int=0)
    step = op.Constant(value_int=1)
    half = op.Constant(value_float=0.5)
    one = op.Constant(value_float=1.0)
    column = op.Constant(value_ints=[1])
    height, width = op.Split(op.Shape(images, start=2, end=4), num_outputs=2)
    cells_high, cells_wide = op.Split(op.Shape(probabilities, start=1, end=3), num_outputs=2)
    y = op.Unsqueeze(op.Add(op.Cast(op.Range(zero, op.Squeeze(height), step), to=1), half), column)
    x = op.Unsqueeze(op.Add(op.Cast(op.Range(zero, op.Squeeze(width), step), to=1), half), column)
    high = op.Cast(cells_high, to=1)
    wide = op.Cast(cells_wide, to=1)
    row = op.Cast(op.Range(zero, op.Squeeze(cells_high), step), to=1)
    cell = op.Cast(op.Range(zero, op.Squeeze(cells_wide), step), to=1)

    @graph()
    def paste(probability: FLOAT[None, None], box: FLOAT[None]):
        x1, y1, x2, y2 = op.Split(box, num_outputs=4)
        at_y = op.Sub(op.Mul(op.Div(op.Sub(y, y1), op.Sub(y2, y1)), high), half)
        at_x = op.Sub(op.Mul(op.Div(op.Sub(x, x1), op.Sub(x2, x1)), wide), half)
        of_rows = op.Relu(op.Sub(one, op.Abs(op.Sub(at_y, row))))
        of_columns = op.Relu(op.Sub(one, op.Abs(op.Sub(at_x, cell))))
        sampled = op.MatMul(op.MatMul(of_rows, probability), op.Transpose(of_columns, perm=[1, 0]))
        mask = op.GreaterOrEqual(sampled, half)
        return mask  # noqa: RET504

    # One of nothing behind them, since a Scan in ONNX Runtime must have something to go over.
    more_probabilities = op.Pad(probabilities, op.Constant(value_ints=[0, 0, 0, 1, 0, 0]))
    more_boxes = op.Pad(boxes, op.Constant(value_ints=[0, 0, 1, 0]))
    with_one_more = op.Scan(more_probabilities, more_boxes, body=paste, num_scan_inputs=2)
    return op.Slice(
        with_one_more, op.Constant(value_ints=[0]), op.Constant(value_ints=[-1]), op.Constant(value_ints=[0])
    )


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """As `onnx_scans.translations`."""

    def suppress_all(boxes, scores, most: int, iou: float):
        return op.NonMaxSuppression(boxes, scores, [most], [iou], [-0.5])

    def paste_all(probabilities, boxes, images):
        return paste_masks(probabilities, boxes, images)

    return {torch.ops.vmamba.suppress_all.default: suppress_all, torch.ops.vmamba.paste_all.default: paste_all}
