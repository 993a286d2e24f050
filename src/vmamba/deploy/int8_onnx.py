"""Int8 in ONNX files: pairs of QuantizeLinear and DequantizeLinear around products, which runtimes fuse with them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # type: ignore[import-untyped]
from onnxruntime.quantization.quant_utils import add_pre_process_metadata  # type: ignore[import-untyped]

from vmamba.deploy.int8 import check_patterns, computes_in_int8, is_excluded
from vmamba.errors import ExportError
from vmamba.files import shown

_PRODUCTS = ("Conv", "Gemm", "MatMul")


def read(path: Path) -> onnx.ModelProto:
    """A float32 ONNX file with one input.

    Raises:
        ExportError: it is something else.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's, or what onnx says of missing external data
        raise ExportError(f"{shown(path)} cannot be read as an ONNX file: {error}") from error
    kinds = {node.op_type for node in model.graph.node}
    if quantised := kinds & {"QuantizeLinear", "DequantizeLinear", "MatMulInteger", "QLinearMatMul", "QLinearConv"}:
        raise ExportError(f"{shown(path)} is quantised already ({', '.join(sorted(quantised))}); give the float32 file")
    if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer):
        raise ExportError(f"{shown(path)} has weights in float16; export it again without half")
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(inputs[0].type.tensor_type.shape.dim) != 4:
        raise ExportError(f"{shown(path)} takes {[value.name for value in inputs]}; expected one input, (B, C, H, W)")
    return model


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """Of the file."""
    return {prop.key: prop.value for prop in model.metadata_props}


def tell(model: onnx.ModelProto, told: dict[str, str]) -> None:
    """Replace the metadata."""
    onnx.helper.set_model_props(model, told)


def input_of(model: onnx.ModelProto) -> tuple[str, int, tuple[int, int] | None, bool]:
    """The input's name, its channels, its height and width, None if they are open, and whether it is uint8."""
    weights = {tensor.name for tensor in model.graph.initializer}
    (value,) = (value for value in model.graph.input if value.name not in weights)
    kind = value.type.tensor_type
    _, chans, height, width = (side.dim_value for side in kind.shape.dim)  # 0 where it is open
    size = (height, width) if height and width else None
    return value.name, chans, size, kind.elem_type == onnx.TensorProto.UINT8


def write(
    model: onnx.ModelProto,
    path: Path,
    batches: Iterable[Any],
    exclude: Sequence[str],
    reduce_range: bool,
    note: tuple[str, str],
) -> int:
    """Quantise a float32 model.

    Args:
        model: as `read` gives it; it is changed.
        path: the file to write.
        batches: inputs, as arrays, to calibrate with.
        exclude: patterns of names of layers that stay in float32.
        reduce_range: 7 bits for weights.
        note: an entry for the metadata.

    Returns:
        The number of products that are quantised.

    Raises:
        ExportError: there is none.
    """
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{index}"
    layers = {node.name: layer for node, layer in _products(model.graph)}
    check_patterns(exclude, layers.values())
    chosen = [name for name, layer in layers.items() if not is_excluded(layer, exclude)]
    if not chosen:
        raise ExportError(
            "the model has no matrix product or convolution to quantise"
            + (f" beside those excluded by {list(exclude)}" if exclude else "")
        )
    told, (name, *_) = metadata(model), input_of(model)
    add_pre_process_metadata(model)  # what that does, the exporter's optimizer has done
    quantize_static(
        model, path, _Reader({name: batch} for batch in batches), QuantFormat.QDQ, list(_PRODUCTS), per_channel=True,
        reduce_range=reduce_range, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        nodes_to_quantize=chosen,
        # Products give float32, to which a runtime adds a bias and what follows; a convolution in int8 gives int8.
        extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"], "MatMulConstBOnly": True},
    )  # fmt: skip
    written = onnx.load(path)
    _forget_origins(written.graph)
    tell(written, told | dict([note]))
    onnx.save(written, path)
    return len(chosen)


def _forget_origins(graph: onnx.GraphProto) -> None:
    """Drop the exporter's notes on each node, which name files of the machine it ran on."""
    for node in graph.node:
        del node.metadata_props[:]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_origins(attribute.g)


class _Reader:
    """What ONNX Runtime calls a CalibrationDataReader."""

    def __init__(self, inputs: Iterator[dict[str, Any]]) -> None:
        self.inputs = inputs

    def get_next(self) -> dict[str, Any] | None:
        return next(self.inputs, None)


def _products(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Those with constant weights that may compute in int8, with their layers.

    What lies inside of loops, the scans, is not looked at.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in _PRODUCTS or node.input[1] not in weights:
            continue
        layer, kind = _layer(node)
        layer = layer or node.name
        if computes_in_int8(layer, kind, weights[node.input[1]].dims):
            yield node, layer


def _layer(node: onnx.NodeProto) -> tuple[str, str]:
    """The path and the class of the module that a node is part of; the exporter notes both."""
    notes = {prop.key: prop.value for prop in node.metadata_props}
    scopes, kinds = (
        ast.literal_eval(notes.get(f"pkg.torch.onnx.{name}", "[]")) for name in ("name_scopes", "class_hierarchy")
    )
    path = str(scopes[-2]) if len(scopes) > 1 else ""
    return re.sub(r"^(network\.)?model\.", "", path), str(kinds[-2]) if len(kinds) > 1 else ""
