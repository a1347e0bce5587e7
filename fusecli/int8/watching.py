"""A graph run node by node, to see the values inside it: those of a float graph, and of its int8 twin.

Both have the same names for the same ops. In the int8 graph a value is quantized and dequantized behind its
node: what is shown of it is what the next op reads, not what the node itself gave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from fusecli.sample import Sample

_QUANTIZE, _DEQUANTIZE = "quantized_decomposed.quantize_per_", "quantized_decomposed.dequantize_per_"


def flat_inputs(graph: fx.GraphModule, sample: Sample) -> list[Any]:
    """The values of the graph's placeholders, as its own `forward` would unpack the sample."""
    bound = inspect.signature(graph.forward).bind(*sample.args, **sample.kwargs)
    bound.apply_defaults()
    names, values = list(bound.arguments), list(bound.arguments.values())
    info = getattr(graph.graph._codegen, "pytree_info", None)
    if info is None:
        return values
    count = len(pytree.tree_unflatten([None] * info.in_spec.num_leaves, info.in_spec)[0])
    nested = (values[:count], dict(zip(names[count:], values[count:], strict=True)))
    return fx_pytree.tree_flatten_spec(nested, info.in_spec)


def run(interpreter: fx.Interpreter, sample: Sample) -> Any:
    """The output of the interpreted graph for a copy of the sample, without gradients."""
    graph = interpreter.module
    assert isinstance(graph, fx.GraphModule)
    with torch.no_grad():
        flat = interpreter.run(*flat_inputs(graph, sample.copy()), enable_io_processing=False)
        return graph.graph.process_outputs(flat)


class Watch(fx.Interpreter):
    """Runs a graph and shows each wanted value once, when it is made; the rest is dropped at its last use."""

    def __init__(
        self, graph: fx.GraphModule, names: Collection[str], show: Callable[[str, Tensor], None]
    ) -> None:
        super().__init__(graph)
        nodes = {node.name: node for node in graph.graph.nodes}
        if missing := [name for name in names if name not in nodes]:
            raise ValueError(f"the graph has no node {', '.join(missing)}")
        self.wanted: dict[fx.Node, list[str]] = {}
        for name in names:
            self.wanted.setdefault(passed_on(nodes[name]), []).append(name)
        self.show = show

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for name in self.wanted.get(n, ()):
            self.show(name, value)
        return value


def passed_on(node: fx.Node) -> fx.Node:
    """The node that holds what is passed on of `node`: the dequantize behind its quantize, or itself."""
    quantized = (user for user in node.users if str(user.target).startswith(_QUANTIZE))
    read = (user for once in quantized for user in once.users if str(user.target).startswith(_DEQUANTIZE))
    return next(read, node)


def node_outputs(graph: fx.GraphModule, names: Collection[str], sample: Sample) -> dict[str, Tensor]:
    """What the graph passes on of each named node for the sample: its value, or that after its quantization.

    Raises ValueError where the graph has no such node.
    """
    return watched(graph, names, sample)[1]


def watched(graph: fx.GraphModule, names: Collection[str], sample: Sample) -> tuple[Any, dict[str, Tensor]]:
    """The output of the graph for the sample, and its `node_outputs`, in one run."""
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        found[name] = value.clone()  # an in-place op behind the node would overwrite what is kept

    return run(Watch(graph, names, keep), sample), found
