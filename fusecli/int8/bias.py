"""Bias correction: what rounding moves the mean of a layer's output by is put into its bias.

With E[y] the mean of an output channel over the calibration inputs, b + E[y float] - E[y int8] has no such
error left. Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix D, the empirical form.
The mean is that of all samples together: how they are split into batches changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from fusecli.int8.flow import tensor_of
from fusecli.int8.ops import op_name
from fusecli.int8.torchao import quiet
from fusecli.int8.units import QuantUnit
from fusecli.int8.watching import Watch, flat_inputs, run
from fusecli.sample import Sample

# Another machine rounds a few activations the other way: of a shift, and of the largest bias.
_ROOM, _CLOSE = 0.05, 1e-6
# Bytes of values between two layers; batches for which there is no room left run again from their inputs on.
_KEPT = 1 << 30


@torch.no_grad()
def correct_biases(
    reference: fx.GraphModule,
    converted: fx.GraphModule,
    units: Sequence[QuantUnit],
    batches: Sequence[Sample],
    progress: Callable[[str], None],
) -> int:
    """Corrects the biases of `converted` in place, layer after layer, and returns how many.

    A layer sees what the corrected layers before it give. Layers without a bias, or whose bias is read
    elsewhere too, stay as they are.
    """
    biases = _biases(converted, units)
    layers = [node for node in converted.graph.nodes if node.name in biases]
    wanted = {layer.name: _Mean(_channel_axis(converted, layer)) for layer in layers}
    for number, batch in enumerate(batches, 1):
        progress(f"correcting biases, batch {number} of {len(batches)}")
        run(Watch(reference, wanted, lambda name, value: wanted[name].add(value)), batch)
    runs = [_Paused(converted, batch) for batch in batches]
    for number, layer in enumerate(layers, 1):
        progress(f"correcting biases, layer {number} of {len(layers)}")
        found, kept = _Mean(wanted[layer.name].axis), 0
        for paused in runs:
            found.add(paused.value(layer))
            kept += paused.bytes
            if kept > _KEPT:
                paused.restart()
        bias = tensor_of(converted, biases[layer.name])
        bias.copy_((bias.double() + wanted[layer.name].value - found.value).to(bias.dtype))
    return len(layers)


def miscorrected(
    reference: fx.GraphModule,
    converted: fx.GraphModule,
    units: Sequence[QuantUnit],
    batches: Sequence[Sample],
    progress: Callable[[str], None],
) -> list[str]:
    """Names of biases that are not what correction on these batches makes of the float ones."""
    with quiet():  # torch warns of its own tree specs when they are copied
        twin = copy.deepcopy(converted)
    biases = {}
    for name in _biases(twin, units).values():
        biases[name] = tensor_of(reference, name).detach()
        tensor_of(twin, name).copy_(biases[name])
    correct_biases(reference, twin, units, batches, progress)
    return [name for name, bias in biases.items() if not _near(twin, converted, name, bias)]


def _near(twin: fx.GraphModule, converted: fx.GraphModule, name: str, bias: Tensor) -> bool:
    wanted, found = tensor_of(twin, name), tensor_of(converted, name)
    room = _ROOM * float((wanted - bias).abs().max()) + _CLOSE * float(bias.abs().max())
    return bool(((found - wanted).abs() <= room).all())


def _biases(converted: fx.GraphModule, units: Sequence[QuantUnit]) -> dict[str, str]:
    """The target of each layer's own bias, by the layer's node."""
    nodes = {node.name: node for node in converted.graph.nodes}
    found = {}
    for unit in units:
        node = nodes[unit.nodes[0]]
        bias = node.args[2] if unit.weight is not None and len(node.args) > 2 else None
        if isinstance(bias, fx.Node) and bias.op == "get_attr" and len(bias.users) == 1:
            found[node.name] = str(bias.target)
    targets = list(found.values())
    return {name: target for name, target in found.items() if targets.count(target) == 1}


def _channel_axis(converted: fx.GraphModule, layer: fx.Node) -> int:
    """Where a layer's output has its channels, from the end: [n, *, c] of a linear one, else [n, c, *k]."""
    weight = layer.args[1]
    while isinstance(weight, fx.Node) and weight.op != "get_attr":
        weight = weight.args[0]  # dequantized
    assert isinstance(weight, fx.Node)
    spatial = 0 if op_name(layer) == "aten.linear" else tensor_of(converted, str(weight.target)).ndim - 2
    return -1 - spatial


class _Mean:
    """The mean of each channel over all values that were added, whatever batch they came in."""

    def __init__(self, axis: int) -> None:
        self.axis, self.count, self.total = axis, 0, torch.zeros((), dtype=torch.float64)

    def add(self, value: Tensor) -> None:
        rows = value.double().movedim(self.axis, -1).flatten(0, -2)
        self.total = self.total + rows.sum(0)
        self.count += len(rows)

    @property
    def value(self) -> Tensor:
        return self.total / self.count


class _Paused(fx.Interpreter):
    """A run of a graph that stops in front of one node after the other: those before it see every change of a
    tensor that was made in front of them."""

    def __init__(self, graph: fx.GraphModule, sample: Sample) -> None:
        super().__init__(graph)
        self.graph_module, self.sample = graph, sample
        self.nodes = list(graph.graph.nodes)
        self.restart()

    def restart(self) -> None:
        """Forgets what has run; the next value is computed from the inputs on."""
        self.next, self.env = 0, {}

    def value(self, node: fx.Node) -> Tensor:
        """What the node gives now; it is not taken for run, so that it may be asked again."""
        if self.next == 0:
            self.args_iter = iter(flat_inputs(self.graph_module, self.sample.copy()))
        while self.nodes[self.next] is not node:
            done = self.nodes[self.next]
            self.env[done] = self.run_node(done)
            for unread in self.user_to_last_uses.get(done, ()):
                del self.env[unread]
            self.next += 1
        value: Tensor = self.run_node(node)
        return value

    @property
    def bytes(self) -> int:
        """How much memory the values take that are kept for the nodes to come."""
        values = (value for node, value in self.env.items() if node.op != "get_attr")
        return sum(value.nbytes for value in values if isinstance(value, Tensor))
