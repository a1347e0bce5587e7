from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusecli.int8 import pairs as module
from fusecli.int8.equalize import equalize, unequal
from fusecli.int8.pairs import pairs
from fusecli.sample import Sample

IMAGE = (2, 3, 8, 8)


class Between(nn.Module):
    """Two layers, and a function between them."""

    def __init__(self, first: nn.Module, f: Callable[..., Tensor], second: nn.Module) -> None:
        super().__init__()
        self.first, self.f, self.second = first, f, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.f(self.first(x)))


def graph_of(model: nn.Module, *shape: int, dynamic: bool = False) -> fx.GraphModule:
    """The export of the model for an input of that shape, its channel ranges far apart."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    x = torch.randn(shape, dtype=next(model.parameters()).dtype)
    return torch.export.export(model.eval(), (x,), dynamic_shapes=shapes).module()


def spoil(graph: fx.GraphModule, seed: int = 0, decades: float = 2.0) -> fx.GraphModule:
    """The graph, each pair's scales moved by 10^uniform(-decades, decades): the same but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    for pair in pairs(graph):
        parameters = {name: parameter.data for name, parameter in graph.named_parameters()}
        rows, columns = pair.rows(parameters), pair.columns(parameters)
        scales = 10 ** ((2 * torch.rand(rows.shape[:2].numel(), generator=generator) - 1) * decades)
        rows.div_(scales.view(*rows.shape[:2], 1, 1, 1))
        columns.mul_(scales.view(*columns.shape[:2], 1, 1, 1))
        if pair.first.bias:
            parameters[pair.first.bias].div_(scales)
    return graph


def twin(graph: fx.GraphModule) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of how it copies its tree specs
        return copy.deepcopy(graph)


def input_of(graph: fx.GraphModule, seed: int = 1) -> Sample:
    node = next(node for node in graph.graph.nodes if node.op == "placeholder")
    shape = [size if isinstance(size, int) else 5 for size in node.meta["val"].shape]
    generator = torch.Generator().manual_seed(seed)
    return Sample((torch.randn(shape, generator=generator).to(node.meta["val"].dtype),))


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def mobile() -> nn.Sequential:
    """conv - relu - depthwise - relu - conv, twice, and a head."""
    block = [conv(16, 16, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU()]
    twice = [*block, *copy.deepcopy(block)]
    return nn.Sequential(
        conv(3, 16), nn.ReLU(), *twice, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6), conv(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.b(y) + y


class Returned(Residual):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return y, self.b(torch.relu(y))


class Untied(nn.Module):
    """A linear layer that is called twice, and one whose weight is another's under its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class SharedBias(Untied):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(6, 6)
        self.b.bias = self.a.bias


class Twice(Untied):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.relu(self.a(x)))


class Computed(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.conv2d(x, self.a.weight * 2, self.a.bias))


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Residual(), IMAGE), (Returned(), IMAGE), (Computed(), IMAGE)]
    + [(model, (2, 6)) for model in (Untied(), SharedBias(), Twice())],
    ids=lambda value: type(value).__name__,
)
def test_no_pair_where_something_else_reads_a_value_or_a_weight(model: nn.Module, shape: tuple[int, ...]):
    graph = graph_of(model, *shape)
    before = twin(graph)
    assert pairs(graph) == ()
    assert equalize(graph) == ()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), graph.parameters(), strict=True))


@pytest.mark.parametrize("shared", ["0.weight", "0.bias", "2.weight"])
def test_no_pair_where_a_weight_has_a_second_name(shared: str):
    graph = graph_of(
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ELU(), nn.Linear(6, 6)), 2, 6
    )
    assert len(pairs(graph)) == 1
    _, leaf = shared.split(".")
    # Export makes one name of them; what was done to the graph since need not have. A view shares as much.
    setattr(
        graph.get_submodule("4"),
        leaf,
        nn.Parameter(graph.get_parameter(shared).detach().view(6, -1).squeeze()),
    )
    assert pairs(graph) == ()


NOT_HOMOGENEOUS = {
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "square": torch.square,
    "plus_one": lambda y: y + 1,
    "padded_with_one": lambda y: F.pad(y, (1, 1, 1, 1), value=1.0),
    "softmax": lambda y: y.softmax(1),
}


@pytest.mark.parametrize("name", NOT_HOMOGENEOUS)
def test_no_pair_through_what_is_not_homogeneous(name: str, monkeypatch: pytest.MonkeyPatch):
    graph = graph_of(Between(conv(3, 6), NOT_HOMOGENEOUS[name], conv(6, 4)), *IMAGE)
    assert pairs(graph) == ()
    # Were it let through, the function would change: that is what the refusal is for.
    ops = {module.aten_op(node) for node in graph.graph.nodes} - {"conv2d", ""}
    monkeypatch.setattr(module, "HOMOGENEOUS", module.HOMOGENEOUS | ops)
    before = twin(graph)
    assert len(pairs(spoil(graph, decades=1.0))) == 1
    assert unequal(before, graph, input_of(graph)) > 1e-3


MIXING = {
    "mean over channels": (conv(3, 6), lambda y: y.mean(1, keepdim=True), conv(1, 4)),
    "mean over channels, then rows": (conv(3, 8), lambda y: y.mean(1), nn.Conv1d(8, 4, 1)),
    "view across the batch": (conv(3, 6), lambda y: y.reshape(8, 6, 4, 4), conv(6, 4)),
    "its own slope": (nn.Linear(6, 1), lambda y: F.prelu(y, y), nn.Linear(1, 3)),
    "mean over all": (conv(3, 6), lambda y: y.mean().expand(2, 6, 4, 4), conv(6, 4)),
    "pool over channels": (conv(3, 6), lambda y: F.avg_pool3d(y, (3, 1, 1), 1, (1, 0, 0)), conv(6, 4)),
    "transpose": (nn.Linear(6, 6), lambda y: y.transpose(0, 1), nn.Linear(2, 3)),
    "view across channels": (conv(3, 6), lambda y: y.reshape(2, 4, 12, 8), conv(4, 4)),
    "flatten into the rows": (conv(3, 6), lambda y: y.flatten(0, 1).flatten(1), nn.Linear(64, 3)),
    "linear over width": (conv(3, 6), torch.relu, nn.Linear(8, 3)),
    "conv over rows": (nn.Linear(8, 8), torch.relu, conv(3, 4)),
    "dropout that drops": (conv(3, 6), lambda y: F.dropout(y, 0.5, training=True), conv(6, 4)),
    "slope of its own": (conv(3, 6), lambda y: F.prelu(y, y[0, :, 0, 0]), conv(6, 4)),
    "padded channels": (conv(3, 6), lambda y: F.pad(y, (0, 0, 0, 0, 1, -1)), conv(6, 4)),
}


@pytest.mark.parametrize("name", MIXING)
def test_no_pair_where_channels_do_not_arrive_one_by_one(name: str):
    first, f, second = MIXING[name]
    shape = {"transpose": (2, 6), "its own slope": (6,)}.get(name, IMAGE)
    assert pairs(graph_of(Between(first, f, second), *shape)) == ()


def test_no_pair_in_a_graph_without_shapes():
    assert pairs(fx.symbolic_trace(nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4)))) == ()


def test_all_pairs_of_a_chain_and_what_is_between_them():
    found = pairs(graph_of(mobile(), *IMAGE))
    assert [(pair.first.node.name, pair.second.node.name) for pair in found] == [
        ("conv2d", "conv2d_1"),
        ("conv2d_1", "conv2d_2"),
        ("conv2d_2", "conv2d_3"),
        ("conv2d_3", "conv2d_4"),
        ("conv2d_4", "linear"),
    ]
    assert [node.name for node in found[0].between] == ["relu"]
    assert [node.name for node in found[-1].between] == ["relu_4", "adaptive_avg_pool2d", "flatten"]
