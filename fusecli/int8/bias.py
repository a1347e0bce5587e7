"""Bias correction: what rounding moves the mean of a layer's output by is put into its bias.

With E[y] the mean of an output channel over the calibration inputs, b + E[y float] - E[y int8] has no such
error left. Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix D, the empirical form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fusecli.int8.flow import tensor_of
from fusecli.int8.torchao import quiet
from fusecli.int8.units import QuantUnit
from fusecli.int8.watching import Watch, run
from fusecli.sample import Sample

# Another machine rounds a few activations the other way: of a shift, and of the largest bias.
_ROOM, _CLOSE = 0.05, 1e-6


@torch.no_grad()
def correct_biases(
    reference: fx.GraphModule,
    converted: fx.GraphModule,
    units: Sequence[QuantUnit],
    batches: Sequence[Sample],
    tick: Callable[[str], None],
) -> int:
    """Corrects the biases of `converted` in place, layer after layer, and returns how many.

    A layer sees what the corrected layers before it give. Each batch is run once through both graphs; what
    remains of it are means. Layers without a bias, or whose bias is read elsewhere too, stay as they are.
    """
    biases = _biases(converted, units)
    shifts: dict[str, list[Tensor]] = {name: [] for name in biases}
    for number, batch in enumerate(batches, 1):
        tick(f"correcting biases, batch {number} of {len(batches)}")
        means: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor, means: dict[str, Tensor] = means) -> None:
            means[name] = _mean(value)

        run(Watch(reference, biases, keep), batch)
        run(_Correcting(converted, means, shifts), batch)
    for name, target in biases.items():
        bias = tensor_of(converted, target)
        bias.copy_((bias.double() + torch.stack(shifts[name]).mean(0)).to(bias.dtype))
    return len(biases)


def miscorrected(
    reference: fx.GraphModule,
    converted: fx.GraphModule,
    units: Sequence[QuantUnit],
    batches: Sequence[Sample],
    tick: Callable[[str], None],
) -> list[str]:
    """Names of biases that are not what correction on these batches makes of the float ones."""
    with quiet():  # torch warns of its own tree specs when they are copied
        twin = copy.deepcopy(converted)
    biases = {}
    for name in _biases(twin, units).values():
        biases[name] = tensor_of(reference, name).detach()
        tensor_of(twin, name).copy_(biases[name])
    correct_biases(reference, twin, units, batches, tick)
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


class _Correcting(fx.Interpreter):
    """Runs the graph with the mean of each layer's output moved to where it is in the float graph."""

    def __init__(
        self, graph: fx.GraphModule, means: Mapping[str, Tensor], shifts: Mapping[str, list[Tensor]]
    ) -> None:
        super().__init__(graph)
        self.means, self.shifts = means, shifts

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name not in self.means:
            return value
        shift = self.means[n.name] - _mean(value)
        self.shifts[n.name].append(shift)
        return value + shift.to(value.dtype).view([-1, *[1] * (value.ndim - 2)] if value.ndim > 2 else [-1])


def _mean(value: Tensor) -> Tensor:
    """Of each output channel: axis 1 of a convolution's [n, c, *k], the last of a linear layer's [n, c]."""
    return value.double().mean([axis for axis in range(value.ndim) if axis != 1])
