"""The pairs of layers in an exported graph that a positive scale per channel can move between.

Between the two is f with f(x / s) = f(x) / s, s > 0 for each channel: ops in a row that are homogeneous and
keep the channels apart. A reshape may move them to another axis, or make several inputs of the second layer
of each (`block`), as a flatten before a linear layer does.

A value or a weight that anything else reads is in no pair: its other readers would see the scale.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

_LAYERS = frozenset(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)) | {"linear"}
# f(s x) = s f(x) for s > 0, element by element. Not so: relu6, hardtanh, sigmoid, tanh, gelu, silu, elu.
HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu", "abs", "clone", "contiguous", "detach", "alias"})
# Homogeneous and for each channel by itself; with the number of spatial axes, the last ones.
_SPATIAL = {
    **{f"{kind}_pool{n}d": n for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)},
    **{f"upsample_nearest{n}d": n for n in (1, 2, 3)},
    **{"upsample_linear1d": 1, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3},
}
_REDUCTIONS = frozenset({"mean", "sum", "amax"})
_RESHAPES = frozenset({"flatten", "view", "reshape", "squeeze", "unsqueeze"})


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer of the graph; weight and bias are the targets of their get_attr nodes."""

    node: fx.Node
    weight: str
    bias: str | None
    groups: int

    def grid(self, weight: Tensor) -> Tensor:
        """The weight as a view [g, o/g, i/g, k]."""
        rows, columns = weight.shape[:2]
        grid: Tensor = weight.view(self.groups, rows // self.groups, columns, -1)
        return grid.transpose(1, 2) if aten_op(self.node).startswith("conv_transpose") else grid


@dataclass(frozen=True)
class Pair:
    """Two layers in a row, the nodes between, and how many inputs of the second a channel is (`block`)."""

    first: Layer
    second: Layer
    between: tuple[fx.Node, ...]
    block: int = 1

    @property
    def tensors(self) -> tuple[str, ...]:
        """The targets of what a scale changes."""
        bias = (self.first.bias,) if self.first.bias else ()
        return (self.first.weight, *bias, self.second.weight)

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight of the first as a view [g, c/g, i/g, k, 1], c: the channels between the two."""
        return self.first.grid(tensors[self.first.weight])[..., None]

    def columns(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight of the second as a view [g, c/g, block, o/g, k]."""
        inputs = self.second.grid(tensors[self.second.weight]).transpose(1, 2)
        return inputs.view(len(inputs), -1, self.block, *inputs.shape[2:])


def pairs(graph: fx.GraphModule) -> tuple[Pair, ...]:
    """Every two layers of an exported graph that a scale per channel can move between.

    The first's weight and bias and the second's weight are read once, by any name; so are the values between.
    A graph without the shapes that export notes (`meta["val"]`) has none.
    """
    layers = {node: layer for node in graph.graph.nodes if (layer := _layer(graph, node))}
    readers = _readers_of_storage(graph)
    found = (_pair(layer, layers) for layer in layers.values())
    return tuple(pair for pair in found if pair and _private(graph, pair, readers))


def aten_op(node: fx.Node) -> str:
    """The aten op of a node without overload, in place or not: "relu"; "" for anything else."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return ""
    return str(node.target.overloadpacket.__name__).removesuffix("_")


def _argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """The noted shape, () where there is none; a dynamic axis is a SymInt."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _layer(graph: fx.GraphModule, node: fx.Node) -> Layer | None:
    if aten_op(node) not in _LAYERS:
        return None
    weight, bias = _argument(node, 1, "weight"), _argument(node, 2, "bias")
    if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
        return None  # computed in the run
    tensor = operator.attrgetter(weight.target)(graph)
    batched = aten_op(node) == "linear" or len(_shape(node)) == tensor.ndim
    if not batched or not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    groups = 1 if aten_op(node) == "linear" else _argument(node, 6, "groups", 1)
    return Layer(node, weight.target, bias and bias.target, groups)


def _pair(first: Layer, layers: Mapping[fx.Node, Layer]) -> Pair | None:
    """The pair that begins with `first`; None where its values go elsewhere or a scale cannot follow them."""
    value, between = first.node, list[fx.Node]()
    axis = _channel_axis(first.node, _shape(value))
    channels = _shape(value)[axis] if _shape(value) else None
    block = 1
    while isinstance(channels, int):
        node = _only_reader(value)
        if node is None:
            return None
        if node in layers:
            return _closed(first, layers[node], tuple(between), axis, channels, block)
        place = _through(node, _shape(value), axis, channels, block)
        if place is None:
            return None
        axis, block = place
        between.append(node)
        value = node
    return None


def _only_reader(value: fx.Node) -> fx.Node | None:
    """The one node that reads the value, if it does so once, as its first argument."""
    if len(value.users) != 1:
        return None
    (node,) = value.users
    inputs = [*node.args, *node.kwargs.values()]
    return node if inputs[0] is value and inputs.count(value) == 1 else None


def _closed(
    first: Layer, second: Layer, between: tuple[fx.Node, ...], axis: int, channels: int, block: int
) -> Pair | None:
    """The pair, if the channels arrive where the second layer has its inputs, whole groups of them."""
    shape = _shape(between[-1] if between else first.node)
    at_inputs = axis == _channel_axis(second.node, shape) and shape[axis] == channels * block
    whole = (channels * block // second.groups) % block == 0
    return Pair(first, second, between, block) if at_inputs and whole else None


def _channel_axis(layer: fx.Node, shape: tuple[Any, ...]) -> int:
    return len(shape) - 1 if aten_op(layer) == "linear" else 1


def _through(
    node: fx.Node, shape: tuple[Any, ...], axis: int, channels: int, block: int
) -> tuple[int, int] | None:
    """Where the channels are behind `node`: axis, entries per channel; None where a scale does not pass."""
    op, out = aten_op(node), _shape(node)
    if not out:
        return None
    if op in HOMOGENEOUS or (op == "dropout" and _argument(node, 2, "train") is False):
        return axis, block
    if op in _SPATIAL:
        return (axis, block) if axis < len(shape) - _SPATIAL[op] else None
    if op == "pad":
        zeros = _argument(node, 2, "mode", "constant") != "constant" or not _argument(node, 3, "value")
        spatial = axis < len(shape) - len(_argument(node, 1, "pad")) // 2
        return (axis, block) if zeros and spatial else None
    if op in _REDUCTIONS:
        return _reduced(node, len(shape), axis, block)
    return _reshaped(shape, out, axis, channels, block) if op in _RESHAPES else None


def _reduced(node: fx.Node, axes: int, axis: int, block: int) -> tuple[int, int] | None:
    dims = _argument(node, 1, "dim")
    gone = {dim % axes for dim in dims} if isinstance(dims, list | tuple) else set()
    if not gone or axis in gone:
        return None
    kept = _argument(node, 2, "keepdim", False)
    return (axis if kept else axis - sum(dim < axis for dim in gone)), block


def _reshaped(
    shape: tuple[Any, ...], out: tuple[Any, ...], axis: int, channels: int, block: int
) -> tuple[int, int] | None:
    """The axis of `out` in front of which nothing has changed, and which holds whole channels in a row."""

    def front(shape: tuple[Any, ...], axis: int) -> list[str]:
        # As text: to compare a dynamic axis with a number would be a guard on it.
        return [str(size) for size in shape[:axis] if str(size) != "1"]

    for there, size in enumerate(out):
        if front(out, there) == front(shape, axis) and isinstance(size, int) and size % channels == 0:
            return there, size // channels
    return None


def _readers_of_storage(graph: fx.GraphModule) -> Counter[int]:
    """How many nodes read each storage, by whatever names."""
    readers: Counter[int] = Counter()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(node.target)(graph)
            if isinstance(value, Tensor):
                readers[value.untyped_storage().data_ptr()] += len(node.users)
    return readers


def _private(graph: fx.GraphModule, pair: Pair, readers: Counter[int]) -> bool:
    tensors = (operator.attrgetter(name)(graph) for name in pair.tensors)
    return all(readers[tensor.untyped_storage().data_ptr()] == 1 for tensor in tensors)
