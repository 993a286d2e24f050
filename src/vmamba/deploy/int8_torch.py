"""Int8 in torch programs: torchao's pt2e quantisation, which inductor turns into oneDNN's int8 products."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vmamba.deploy.int8 import check_patterns, computes_in_int8, is_excluded
from vmamba.errors import ExportError

_noisy = logging.getLogger("torch.utils._pytree")
_level = _noisy.level
_noisy.setLevel(logging.ERROR)  # torchao registers a class in a way that torch would rather not have
try:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import get_default_x86_inductor_quantization_config
finally:
    _noisy.setLevel(_level)

_LINEAR, _CONVOLUTION = torch.ops.aten.linear.default, torch.ops.aten.conv2d.default


class ProductQuantizer(Quantizer):
    """Marks the products that compute in int8.

    torchao's own quantizer for this backend looks for torch's classes of layers, of which ours are subclasses, and
    would quantise what lies between them too.

    Attributes:
        marked: how many there are.
        layers: those that would be quantised but for what is excluded.
    """

    def __init__(self, exclude: Sequence[str], reduce_range: bool) -> None:
        super().__init__()
        self.exclude, self.marked = exclude, 0
        self.layers: list[str] = []
        self.config = get_default_x86_inductor_quantization_config(reduce_range=reduce_range)

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark them."""
        for node in model.graph.nodes:
            if node.target in (_LINEAR, _CONVOLUTION) and self._is_chosen(node):
                images, weight = node.args[:2]
                specs = {images: self.config.input_activation, weight: self.config.weight}
                node.meta["quantization_annotation"] = QuantizationAnnotation(specs, _annotated=True)
                self.marked += 1
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing is asked of the graph."""

    def _is_chosen(self, node: Node) -> bool:
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return False  # computed, as the joined projections of the routes are
        layer, kind = list(node.meta.get("nn_module_stack", {"": ("", "")}).values())[-1]
        kind = kind if isinstance(kind, str) else kind.__name__
        if not computes_in_int8(layer, kind, weight.meta["val"].shape):
            return False
        self.layers.append(layer)
        return not is_excluded(layer, self.exclude)


def quantised(
    program: torch.export.ExportedProgram, batches: Iterable[Tensor], exclude: Sequence[str], reduce_range: bool
) -> tuple[GraphModule, int]:
    """The graph of a program with its products in int8, and how many of them there are.

    Args:
        program: of a model in float32.
        batches: inputs to calibrate with.
        exclude, reduce_range: as for `vmamba.deploy.quantize`.

    Raises:
        ExportError: there is no product to quantise.
    """
    quantizer = ProductQuantizer(exclude, reduce_range)
    observed = prepare_pt2e(program.module(), quantizer)
    check_patterns(exclude, quantizer.layers)
    if not quantizer.marked:
        raise ExportError(
            "the model has no matrix product or convolution to quantise"
            + (f" beside those excluded by {list(exclude)}" if exclude else "")
        )
    with torch.no_grad():
        for batch in batches:
            observed(batch)
        found = convert_pt2e(observed)
    _drop_unused(found)
    return found, quantizer.marked


def _drop_unused(model: GraphModule) -> None:
    """Leave out the float32 weights that int8 ones have replaced: they would be written too."""
    used = {node.target for node in model.graph.nodes if node.op == "get_attr"}
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(owner), leaf)
