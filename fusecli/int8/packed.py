"""A converted graph as plain tensors, and back: what a safetensors file beside a manifest can hold.

    stem.conv.weight               int8, the weight's own name and shape
    stem.conv.weight.scale         float32, one or one per output channel
    stem.conv.weight.zero_point    int32, only where not all are 0
    stem.conv.bias                 float32, as everything that stays float: its own name
    stem.conv.output.scale         float32, one: the value that the layer gives, behind its activation
    stem.conv.output.zero_point    int32
    x.output.scale                 values that no module owns are called by their node in the exported graph

Dequantized is (integer - zero point) * scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fusecli.errors import Problem, UsageError
from fusecli.int8.calibrate import value_names
from fusecli.int8.flow import convert, fix, observers, prepare, tensor_of
from fusecli.int8.ops import op_name
from fusecli.int8.quantize import Plan, Quantized, plan
from fusecli.int8.units import Options
from fusecli.sample import Sample

VERSION = 1
DIFFERENT = "give the model and the sample that were quantized"


def packed(quantized: Quantized) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the facts that go with them."""
    tensors: dict[str, Tensor] = {}
    for name, integers, scale, zero_point in integer_weights(quantized):
        tensors[name] = integers
        tensors[f"{name}.scale"] = scale
        if zero_point.any():
            tensors[f"{name}.zero_point"] = zero_point
    for name, node in quantized_values(quantized):
        tensors[f"{name}.scale"] = torch.tensor(node.args[1], dtype=torch.float32)
        tensors[f"{name}.zero_point"] = torch.tensor(node.args[2], dtype=torch.int32)
    for target in float_names(quantized.model):
        tensors[target] = tensor_of(quantized.model, target).detach()
    kept = {name: tensor.clone().contiguous() for name, tensor in sorted(tensors.items())}
    return kept, record_of(quantized)


def record_of(quantized: Quantized) -> dict[str, Any]:
    """What a manifest has to keep to build the graph again, as plain JSON values."""
    return {"version": VERSION, "options": asdict(quantized.options), **described(quantized.plan)}


def unpacked(
    model: nn.Module, sample: Sample, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> GraphModule:
    """The converted graph that was packed, built from the model's code and the tensors alone.

    The model's own weights do not matter. Raises UsageError where model, facts and tensors do not belong
    together.
    """
    if facts.get("version") != VERSION:
        what = f"they are of version {facts.get('version')}, and {VERSION} is read here"
        raise UsageError(Problem(what, "the facts about int8"))
    planned = plan(model, sample)
    for key, value in described(planned).items():
        if facts.get(key) != value:
            raise UsageError(Problem(f"the model's {key} are not those that were packed", fix=DIFFERENT))
    options = Options(**facts["options"])
    prepared = prepare(planned.exported.module, planned.units, options)
    names = value_names(prepared, planned.units)
    for node, observer in observers(prepared):
        name = names[node.name]
        scale = taken(tensors, f"{name}.scale")
        zero_point = tensors.get(f"{name}.zero_point", torch.zeros(1, dtype=torch.int32))
        fix(node, observer, scale, zero_point, name)
    converted = convert(prepared)
    quantized = Quantized(planned, converted, options, names)
    for name, integers, _, _ in integer_weights(quantized):
        put(integers, taken(tensors, name), name)
    for target in float_names(converted):
        put(tensor_of(converted, target), taken(tensors, target), target)
    again = packed(quantized)[0]
    if strange := sorted(tensors.keys() - again.keys() - _zero_points(quantized)):
        raise UsageError(Problem("nothing of the model is called so", strange[0], DIFFERENT))
    for name in sorted(tensors.keys() & again.keys()):
        if not bool((tensors[name] == again[name]).all()):
            what = "it is another number than that of the values it shares its scale with"
            raise UsageError(Problem(what, name, DIFFERENT))
    return converted


def _zero_points(quantized: Quantized) -> set[str]:
    """Of weights: they are stored where not all are 0, and may be anyway."""
    return {f"{name}.zero_point" for name, *_ in integer_weights(quantized)}


def integer_weights(quantized: Quantized) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, integers, scale and zero point of each quantized weight: the tensors of the graph, not copies."""
    nodes = {node.name: node for node in quantized.model.graph.nodes}
    done = set()
    for unit in quantized.units:
        if unit.weight is not None and unit.weight not in done:
            done.add(unit.weight)
            integers, scale, zero_point = nodes[unit.nodes[0]].args[1].args[:3]
            if isinstance(scale, Node):  # per channel; per tensor they are numbers
                scale, zero_point = (
                    tensor_of(quantized.model, str(each.target)) for each in (scale, zero_point)
                )
            scale = torch.as_tensor(scale, dtype=torch.float32)
            zero_point = torch.as_tensor(zero_point).to(torch.int32)
            yield unit.weight, tensor_of(quantized.model, integers.target), scale, zero_point


def quantized_values(quantized: Quantized) -> Iterator[tuple[str, Node]]:
    """The name of each quantized activation, and the op that quantizes it."""
    for node in quantized.model.graph.nodes:
        if op_name(node) == "quantized_decomposed.quantize_per_tensor":
            yield quantized.names[node.args[0].name], node


def float_names(module: GraphModule) -> list[str]:
    """The parameters, buffers and constants that the graph reads as they are, without dequantizing them."""
    return [
        str(node.target)
        for node in module.graph.nodes
        if node.op == "get_attr"
        and node.users
        and not any("dequantize" in op_name(reader) for reader in node.users)
    ]


def described(planned: Plan) -> dict[str, Any]:
    """What two graphs of one model have in common: their units and their ops, as plain JSON values."""
    graph = planned.exported.module.graph
    ops = "\n".join(f"{node.name} {node.target}" for node in graph.nodes if node.op != "call_module")
    units = [{key: listed(value) for key, value in asdict(unit).items()} for unit in planned.units]
    return {"units": units, "ops": hashlib.sha256(ops.encode()).hexdigest()}


def listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def taken(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UsageError(Problem("it is missing", name, DIFFERENT))
    return tensors[name]


@torch.no_grad()
def put(target: Tensor, value: Tensor, name: str) -> None:
    if target.shape != value.shape or target.dtype != value.dtype:
        found, wanted = (f"{each.dtype} {tuple(each.shape)}" for each in (value, target))
        what = f"it is {found}, and {wanted} belongs here".replace("torch.", "")
        raise UsageError(Problem(what, name, DIFFERENT))
    target.copy_(value)
