"""torchao's Quantizer for the units that were chosen: what is observed, with which range of integers.

Activations: per tensor, affine, uint8 0..255. Weights: symmetric, int8 -127..127, so that their zero point is
0 and a weight and its negative have the same magnitude. Biases are not quantized: they stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fusecli.int8.ops import LAYERS, op_name
from fusecli.int8.torchao import flow
from fusecli.int8.units import Options, QuantUnit

ANNOTATION = "quantization_annotation"  # torchao's key in a node's meta
WEIGHT_RANGE = -127, 127


def quantizer(units: Sequence[QuantUnit], options: Options) -> Any:
    """A torchao Quantizer that annotates exactly these units."""

    class UnitQuantizer(flow().Quantizer):  # type: ignore[misc]  # torchao is untyped
        def annotate(self, model: GraphModule) -> GraphModule:
            nodes = {node.name: node for node in model.graph.nodes}
            for unit in units:
                annotate(nodes, unit, options)
            return model

        def validate(self, model: GraphModule) -> None:
            pass  # the units were chosen on this very graph

    return UnitQuantizer()


def annotate(nodes: dict[str, Node], unit: QuantUnit, options: Options) -> None:
    """The unit's first op gets the specs of its inputs, its last the spec of the output."""
    torchao, first, last = flow(), nodes[unit.nodes[0]], nodes[unit.output]
    specs: dict[Any, Any] = {value: activations(options) for value in quantized_inputs(first)}
    output = torchao.SharedSpec((first.args[0], first)) if unit.follows else activations(options)
    if unit.weight is not None:
        specs[first.args[1]] = weights(options, LAYERS[op_name(first)])
    if first is last:
        first.meta[ANNOTATION] = torchao.Annotation(specs, output, _annotated=True)
    else:
        first.meta[ANNOTATION] = torchao.Annotation(specs, None, _annotated=True)
        last.meta[ANNOTATION] = torchao.Annotation({}, output, _annotated=True)


def quantized_inputs(node: Node) -> list[Node]:
    """The activations that an op reads: a list of them, two, or its first argument."""
    listed = node.args[0] if isinstance(node.args[0], tuple | list) else node.args[:2]
    values = node.args[:1] if op_name(node) in LAYERS else listed
    floating = (value for value in values if isinstance(value, Node) and is_float(value))
    return list(dict.fromkeys(floating))


def is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def activations(options: Options) -> Any:
    torchao = flow()
    return torchao.Spec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=torchao.Histogram if options.observer == "histogram" else torchao.MinMax,
    )


def weights(options: Options, axis: int) -> Any:
    torchao, each = flow(), options.weights == "per-channel"
    return torchao.Spec(
        dtype=torch.int8,
        quant_min=WEIGHT_RANGE[0],
        quant_max=WEIGHT_RANGE[1],
        qscheme=torch.per_channel_symmetric if each else torch.per_tensor_symmetric,
        ch_axis=axis if each else None,
        observer_or_fake_quant_ctr=torchao.PerChannelMinMax if each else torchao.MinMax,
    )
