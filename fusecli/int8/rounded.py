"""Whether a converted graph holds the float weights, rounded: no threshold on outputs may decide that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fusecli.int8.flow import tensor_of
from fusecli.int8.ops import LAYERS, op_name
from fusecli.int8.packed import float_names, packed
from fusecli.int8.quantize import Quantized
from fusecli.int8.quantizer import WEIGHT_RANGE
from fusecli.int8.units import QuantUnit

# Of a step: the quotient is rounded to float32 before it is rounded to an integer.
HALF = 0.5 + 1e-3
# Of an activation's scale: a histogram's search may end in another bin where the last digit of a value is
# another. No calibration decides what a weight's scale is: it is its largest value, divided.
ROOM = {"minmax": 1e-3, "histogram": 1e-2}
WEIGHT_ROOM = 1e-6


def otherwise_scaled(quantized: Quantized, converted: GraphModule) -> list[str]:
    """Names of scales and zero points of `converted` that are not those of `quantized`, which was made of the
    same model by the same calibration; what another machine rounds otherwise is let through."""
    mine, theirs = (packed(replace(quantized, model=graph))[0] for graph in (quantized.model, converted))
    weights = {unit.weight for unit in quantized.units}
    none = torch.zeros(1, dtype=torch.int32)  # symmetric weights have no zero point
    wrong = []
    for name in sorted(mine.keys() | theirs.keys()):
        value, _, kind = name.rpartition(".")
        if kind == "scale":
            room = WEIGHT_ROOM if value in weights else ROOM[quantized.options.observer]
            wrong += [] if _near(mine.get(name), theirs.get(name), room) else [name]
        if kind == "zero_point":
            gap = mine.get(name, none) - theirs.get(name, none)
            wrong += [name] if int(gap.abs().max()) > (value not in weights) else []
    return wrong


def _near(mine: Tensor | None, theirs: Tensor | None, room: float) -> bool:
    if mine is None or theirs is None or mine.shape != theirs.shape:
        return False
    return torch.allclose(mine, theirs, rtol=room, atol=0)


def misrounded(
    reference: GraphModule, converted: GraphModule, units: Sequence[QuantUnit], *, corrected: bool
) -> list[str]:
    """Names of weights whose integers are not clamp(round(W / scale) + zero point), and of tensors that stay
    float and are other numbers, or are in one of both only; `corrected`: biases may be other numbers."""
    nodes = {node.name: node for node in converted.graph.nodes}
    layers = {unit.weight: nodes[unit.nodes[0]] for unit in units if unit.weight is not None}
    wrong = [name for name, layer in layers.items() if not _holds(reference, converted, name, layer)]
    biases = {
        str(n.args[2].target) for n in layers.values() if len(n.args) > 2 and isinstance(n.args[2], Node)
    }
    integers = {tensor_of(reference, name) for name in layers}  # one tensor may have several names
    names = {name for name in float_names(reference) if tensor_of(reference, name) not in integers}
    found = set(float_names(converted))
    kept = names & found - (biases if corrected else set())
    return [
        *wrong,
        *sorted(names ^ found),
        *(n for n in sorted(kept) if not torch.equal(tensor_of(reference, n), tensor_of(converted, n))),
    ]


def _holds(reference: GraphModule, converted: GraphModule, name: str, layer: Node) -> bool:
    """The weight of a layer is read behind the op that dequantizes it, which has all the numbers."""
    dequantize: Any = layer.args[1]
    if not op_name(dequantize).startswith("quantized_decomposed.dequantize_per_"):
        return False
    integers, scale, zero_point = dequantize.args[:3]
    weight = tensor_of(reference, name).detach().double()
    if isinstance(scale, Node):  # per channel
        shape = [-1 if at == LAYERS[op_name(layer)] else 1 for at in range(weight.ndim)]
        scale, zero_point = (
            tensor_of(converted, str(each.target)).double().view(shape) for each in (scale, zero_point)
        )
    found = tensor_of(converted, str(integers.target))
    if found.shape != weight.shape or found.dtype != torch.int8:
        return False
    wanted: Tensor = (weight / scale + zero_point).clamp(*WEIGHT_RANGE)
    return bool(((found.double() - wanted).abs() <= HALF).all())
