"""Whether a converted graph holds the float weights, rounded: no threshold on outputs may decide that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecli.int8.flow import tensor_of
from fusecli.int8.packed import float_names
from fusecli.int8.units import QuantUnit

# Of a step: the quotient is rounded to float32 before it is rounded to an integer.
HALF = 0.5 + 1e-3


def misrounded(
    reference: GraphModule, converted: GraphModule, units: Sequence[QuantUnit], *, corrected: bool
) -> list[str]:
    """Names of weights whose integers are not clamp(round(W / scale) + zero point), and of tensors that stay
    float and are other numbers; `corrected`: biases may be."""
    nodes = {node.name: node for node in converted.graph.nodes}
    layers = {unit.weight: nodes[unit.nodes[0]] for unit in units if unit.weight is not None}
    wrong = [name for name, layer in layers.items() if not _holds(reference, converted, name, layer)]
    biases = {
        str(n.args[2].target) for n in layers.values() if len(n.args) > 2 and isinstance(n.args[2], Node)
    }
    names = set(float_names(reference)) & set(float_names(converted))
    kept = names - biases if corrected else names
    return wrong + [
        name
        for name in sorted(kept)
        if not torch.equal(tensor_of(reference, name), tensor_of(converted, name))
    ]


def _holds(reference: GraphModule, converted: GraphModule, name: str, layer: Node) -> bool:
    """The weight of a layer is read behind the op that dequantizes it, which has all the numbers."""
    dequantize: Any = layer.args[1]
    integers, scale, zero_point, *rest = dequantize.args
    weight = tensor_of(reference, name).detach().double()
    if isinstance(scale, Node):  # per channel
        axis, low, high = rest[:3]
        shape = [-1 if at == axis else 1 for at in range(weight.ndim)]
        scale, zero_point = (
            tensor_of(converted, str(each.target)).double().view(shape) for each in (scale, zero_point)
        )
    else:
        low, high = rest[:2]
    found = tensor_of(converted, str(integers.target))
    if found.shape != weight.shape or found.dtype != torch.int8:
        return False
    wanted: Tensor = (weight / scale + zero_point).clamp(low, high)
    return bool(((found.double() - wanted).abs() <= HALF).all())
