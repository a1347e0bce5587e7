"""Which ops of an exported graph are computed on quantized values, and why the others are not.

A pure reading of the graph: nothing of torchao is needed to say what would be quantized.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from fusecli.int8.ops import ABSORBED, FOLLOWERS, LAYERS, NORMS, PAIRS, changes_values, op_name, short
from fusecli.int8.units import LeftFloat, QuantUnit
from fusecli.sample import tensors_in

UNFOLDED = "a batch norm that was not folded into a layer: fold it first, then quantize"
FLOAT_INPUT = "it only passes values on, and its input is not quantized"


class Annotation:
    """The units of a graph and what it leaves float, found in one pass over the nodes."""

    def __init__(self, module: GraphModule) -> None:
        self.units: list[QuantUnit] = []
        self.left: list[LeftFloat] = []
        self.quantized: set[Node] = set()
        self.moving: set[Node] = set()  # values that depend on the input
        absorbed: set[Node] = set()
        for node in module.graph.nodes:
            reads = node.op == "placeholder" or any(read in self.moving for read in node.all_input_nodes)
            if reads and any_tensor(node):  # what depends on the size of an input only, does not move
                self.moving.add(node)
            if node in absorbed or node not in self.moving or not op_name(node) or not any_float(node):
                continue
            reason = self.obstacle(node)
            if reason:
                self.left.append(LeftFloat(node.name, path_of(node), op_name(node), reason))
            else:
                taken_in = activation_behind(node)
                absorbed.update(taken_in)
                self.quantized.add((node, *taken_in)[-1])
                self.units.append(unit_of(node, taken_in))
        self.units = uniquely_named(self.units, {node.name for node in module.graph.nodes})

    def obstacle(self, node: Node) -> str:
        """Why the op stays float; '' where it is quantized."""
        name = op_name(node)
        if name in NORMS:
            return UNFOLDED
        if name in LAYERS:
            return self.obstacle_of_layer(node)
        if name in PAIRS or name == "aten.cat":
            return self.obstacle_of_sum(node)
        if name in FOLLOWERS or name in ABSORBED:
            return self.obstacle_of_follower(node)
        return f"there is no integer form of {short(node)} here"

    def obstacle_of_layer(self, node: Node) -> str:
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return "its weight is computed in the run, and is no stored parameter"
        for reader in weight.users:
            if LAYERS.get(op_name(reader)) != LAYERS[op_name(node)] or reader.args[1] is not weight:
                return f"its weight {weight.target} is also read by {reader.name}, which needs it as it is"
        if not plain(weight):
            return f"its weight is {dtype(weight)}; only float32 is quantized"
        return self.obstacle_of_inputs(node, [node.args[0]])

    def obstacle_of_sum(self, node: Node) -> str:
        joined = node.args[0] if op_name(node) == "aten.cat" else node.args[:2]
        if node.kwargs.get("alpha", 1) != 1:
            return "its second operand is multiplied by alpha"
        return self.obstacle_of_inputs(node, list(joined) if isinstance(joined, tuple | list) else [])

    def obstacle_of_follower(self, node: Node) -> str:
        if node.args[0] not in self.quantized:
            return FLOAT_INPUT
        if changes_values(node):
            return "it makes values that its input does not have"
        return self.obstacle_of_inputs(node, [node.args[0]])

    def obstacle_of_inputs(self, node: Node, inputs: list[object]) -> str:
        for value in inputs:
            if not isinstance(value, Node):
                return "one of its operands is a number"
            if value not in self.moving:
                return f"its operand {value.name} is a constant of the model, and no activation"
            if not plain(value):
                return f"its operand {value.name} is {dtype(value)}; only float32 is quantized"
        if any(isinstance(value, Node) for value in node.kwargs.values()):
            return "torchao does not take tensors that are passed by keyword"
        return "" if plain(node) else f"its result is {dtype(node)}; only float32 is quantized"


def activation_behind(node: Node) -> tuple[Node, ...]:
    """The ReLU, ReLU6 or hardtanh that is the only reader of a layer's or a sum's result."""
    readers = tuple(node.users)
    takes = op_name(node) in LAYERS or op_name(node) in PAIRS
    return readers if takes and len(readers) == 1 and op_name(readers[0]) in ABSORBED else ()


def unit_of(node: Node, taken_in: tuple[Node, ...]) -> QuantUnit:
    weight = str(node.args[1].target) if op_name(node) in LAYERS and isinstance(node.args[1], Node) else None
    # The module that ran it, where one of torch's did: several may share one weight, which has one name only.
    owner = weight.rpartition(".")[0] if weight and not is_layer(node) else path_of(node)
    paths = (owner, *(path_of(part) for part in taken_in if is_layer(part)))
    nodes = tuple(part.name for part in (node, *taken_in))
    return QuantUnit(
        name=owner if weight or is_layer(node) else nodes[-1],
        modules=tuple(dict.fromkeys(paths)),
        nodes=nodes,
        output=nodes[-1],
        weight=weight,
        kind="+".join(short(part) for part in (node, *taken_in)),
        follows=op_name(node) in FOLLOWERS,
    )


def uniquely_named(units: list[QuantUnit], nodes: set[str]) -> list[QuantUnit]:
    """A module's path names its unit where it has one only, and where it is no node of another unit."""
    times = Counter(unit.name for unit in units)
    clear = {u.name for u in units if u.name and times[u.name] == 1 and u.name not in nodes - {*u.nodes}}
    return [unit if unit.name in clear else replace(unit, name=unit.output) for unit in units]


def path_of(node: Node) -> str:
    """The path of the innermost module that ran the op."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).partition("@")[0] if stack else ""


def is_layer(node: Node) -> bool:
    """Whether a module of torch ran the op, so that the path says which op it is."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    kind = stack[-1][1] if stack else ""
    return (kind if isinstance(kind, str) else kind.__module__).startswith("torch.nn.modules.")


def any_tensor(node: Node) -> bool:
    return bool(tensors_in(node.meta.get("val")))


def any_float(node: Node) -> bool:
    return any(tensor.is_floating_point() for tensor in tensors_in(node.meta.get("val")))


def plain(node: Node) -> bool:
    return dtype(node) == "float32"


def dtype(node: Node) -> str:
    value = node.meta.get("val")
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else "no tensor"
