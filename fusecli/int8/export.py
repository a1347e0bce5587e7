"""A model as a graph of torch's ops: exported, freed of in-place ops, and held against the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fusecli.errors import Problem, UsageError
from fusecli.int8.numbers import telling_size
from fusecli.int8.ops import short
from fusecli.int8.torchao import quiet
from fusecli.sample import Sample, tensors_in

CLOSE = 1e-4  # of the largest output: the same float32 ops, in another order at most


@dataclass(frozen=True)
class Exported:
    """The graph, the arguments it was exported with, whether dim 0 is free, and what the user should know.

    The graph shares its parameters with the model.
    """

    module: GraphModule
    sample: Sample
    batched: bool
    notes: tuple[str, ...] = ()


def exported(model: nn.Module, sample: Sample) -> Exported:
    """The model in inference mode as a graph, with any batch size where it allows that.

    Raises UsageError where torch.export cannot follow the model, or gives another function.
    """
    if model.training:
        raise UsageError(Problem("the model is in training mode", fix="call model.eval() first"))
    try:
        pair = with_batch_of_two(sample)
        found = Exported(graph_of(model, pair, batched=True), pair, True)
    except Exception:
        found = fixed(model, sample)
    same_function(model, found.module, sample)
    return found


def fixed(model: nn.Module, sample: Sample) -> Exported:
    """The export for exactly the sample's sizes; UsageError with one line of torch's where there is none."""
    try:
        module = graph_of(model, sample.copy(), batched=False)
    except Exception as error:
        lines = (line.strip() for line in str(error).splitlines())
        what = f"the model cannot be exported: {next(filter(None, lines), type(error).__name__)}"
        fix = "torch.export has to see the whole forward: no branches on values, no code that leaves torch"
        raise UsageError(Problem(what, type(model).__name__, fix)) from None
    sizes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors_in((sample.args, sample.kwargs)))
    return Exported(module, sample, False, (f"the graph takes inputs of exactly these sizes: {sizes}",))


def graph_of(model: nn.Module, sample: Sample, *, batched: bool) -> GraphModule:
    """The exported graph without in-place ops: what is dequantized twice must not be written to once."""
    with quiet():
        return named(program(model, sample, batched=batched).run_decompositions({}).module())


def program(model: nn.Module, sample: Sample, *, batched: bool) -> torch.export.ExportedProgram:
    """torch.export of the model; batched: dim 0 is free for all tensors of the first one's size there."""
    args, kwargs = sample.args, dict(sample.kwargs)
    shapes: Any = None
    with quiet(), torch.no_grad():
        if batched:
            collection = torch.export.ShapesCollection()
            for tensor in along_the_batch(sample):
                collection[tensor] = {0: torch.export.Dim("batch")}
            shapes = collection.dynamic_shapes(model, args, kwargs)
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


def along_the_batch(sample: Sample) -> list[Tensor]:
    """The tensors that have the first one's size at dim 0."""
    tensors = [tensor for tensor in tensors_in((sample.args, dict(sample.kwargs))) if tensor.ndim]
    if not tensors:
        raise ValueError("no tensor has a batch")
    return [tensor for tensor in tensors if tensor.shape[0] == tensors[0].shape[0]]


def with_batch_of_two(sample: Sample) -> Sample:
    """Fresh tensors; a batch of one is doubled, as torch.export takes a size of 1 for a constant."""
    batch = along_the_batch(sample)[0].shape[0]

    def fresh(tensor: Tensor) -> Tensor:
        double = tensor.ndim and tensor.shape[0] == batch == 1
        return torch.cat([tensor, tensor]) if double else tensor.detach().clone()

    return sample.mapped(fresh)


def named(module: GraphModule, names: Mapping[Node, str] | None = None) -> GraphModule:
    """The same graph, its nodes under these names, or named by their ops and counted.

    torch counts nodes that it tried and dropped: its names of one model differ with the sizes of the sample.
    """
    graph, copies = Graph(), dict[Node, Node]()
    for node in module.graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
        name = (names or {}).get(node) or (short(node) if node.op == "call_function" else node.name)
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        copies[node].meta = dict(node.meta)
    graph.set_codegen(module.graph._codegen)  # it knows the names and the nesting of the arguments
    module.graph = graph
    return module


@torch.no_grad()
def same_function(model: nn.Module, module: GraphModule, sample: Sample) -> None:
    """Raises UsageError unless the graph gives the model's outputs on the sample."""
    one, other = sample.copy(), sample.copy()
    with quiet():
        wanted = tensors_in(model(*one.args, **one.kwargs))
        found = tensors_in(module(*other.args, **other.kwargs))
    for a, b in zip(wanted, found, strict=True):
        scale = telling_size(a, b) if a.is_floating_point() and a.shape == b.shape else 0.0
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=CLOSE * scale, equal_nan=True):
            what = "the exported graph gives other outputs than the model on the same input"
            fix = "look for random numbers or hidden state in its forward"
            raise UsageError(Problem(what, type(model).__name__, fix))
