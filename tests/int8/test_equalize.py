from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusecli.int8.equalize import Equalized, channel_ranges, equalize, equalized, unequal
from fusecli.int8.numbers import sqnr
from fusecli.int8.pairs import pairs
from fusecli.sample import Sample
from tests.int8.test_pairs import IMAGE, Between, conv, graph_of, input_of, mobile, spoil, twin


def rough(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with each weight rounded as int8 with one scale per tensor rounds it."""
    for parameter in graph.parameters():
        if parameter.ndim > 1:
            step = parameter.detach().abs().max() / 127
            parameter.data = (parameter.data / step).round() * step
    return graph


HOMOGENEOUS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "relu": torch.relu,
    "relu in place": torch.relu_,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.1),
    "prelu": nn.PReLU(6),
    "prelu of one": nn.PReLU(1),
    "abs": torch.abs,
    "dropout": nn.Dropout(),
    "clone": torch.clone,
    "max_pool": lambda y: F.max_pool2d(y, 2, padding=1),
    "avg_pool": lambda y: F.avg_pool2d(y, 2, padding=1),
    "adaptive_avg_pool": lambda y: F.adaptive_avg_pool2d(y, 3),
    "mean, kept": lambda y: y.mean((2, 3), keepdim=True),
    "amax": lambda y: y.amax(3, keepdim=True),
    "nearest": lambda y: F.interpolate(y, scale_factor=2),
    "bilinear": lambda y: F.interpolate(y, size=(5, 7), mode="bilinear"),
    "zero padding": lambda y: F.pad(y, (1, 0, 2, 0)),
    "reflection": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "view": lambda y: y.view(y.shape[0], 6, -1, 4),
    "all in a row": lambda y: F.max_pool2d(F.leaky_relu(F.pad(y, (1, 1)), 0.3), 2).relu(),
}
LAYERS: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor], nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(3, 6, 3), torch.relu, nn.Conv1d(6, 4, 3), (2, 3, 9)),
    "conv3d": (nn.Conv3d(3, 6, 3), torch.relu, nn.Conv3d(6, 4, 1), (2, 3, 4, 4, 4)),
    "without bias": (conv(3, 6, bias=False), torch.relu, conv(6, 4, bias=False), IMAGE),
    "padded by name": (
        nn.Conv2d(3, 6, 3, padding="same"),
        torch.relu,
        nn.Conv2d(6, 4, 3, padding="same"),
        IMAGE,
    ),
    "depthwise second": (conv(3, 6), torch.relu, conv(6, 6, groups=6), IMAGE),
    "depthwise, two each": (conv(3, 6), torch.relu, conv(6, 12, groups=6), IMAGE),
    "depthwise first": (conv(3, 3, groups=3), torch.relu, conv(3, 4), IMAGE),
    "grouped second": (conv(3, 6), torch.relu, conv(6, 4, groups=2), IMAGE),
    "grouped first": (conv(3, 6, groups=3), torch.relu, conv(6, 4), IMAGE),
    "both grouped": (conv(3, 6, groups=3), torch.relu, conv(6, 4, groups=2), IMAGE),
    "transposed first": (nn.ConvTranspose2d(3, 6, 2, 2), torch.relu, conv(6, 4), IMAGE),
    "transposed second": (conv(3, 6), torch.relu, nn.ConvTranspose2d(6, 4, 2, 2), IMAGE),
    "transposed, grouped": (
        nn.ConvTranspose2d(3, 6, 2, groups=3),
        torch.relu,
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        IMAGE,
    ),
    "transposed 1d": (nn.ConvTranspose1d(3, 6, 2), torch.relu, nn.ConvTranspose1d(6, 4, 2), (2, 3, 9)),
    "linear": (nn.Linear(5, 6), torch.relu, nn.Linear(6, 4), (2, 5)),
    "linear on tokens": (nn.Linear(5, 6), torch.relu, nn.Linear(6, 4), (2, 7, 5)),
    "flatten": (conv(3, 6), lambda y: F.max_pool2d(y.relu(), 2).flatten(1), nn.Linear(96, 4), IMAGE),
    "reshape": (conv(3, 6), lambda y: y.reshape(y.shape[0], -1), nn.Linear(384, 4), IMAGE),
    "flatten by halves": (conv(3, 6), lambda y: y.flatten(2).relu().flatten(1), nn.Linear(384, 4), IMAGE),
    "mean": (conv(3, 6), lambda y: y.relu().mean((2, 3)), nn.Linear(6, 4), IMAGE),
    "mean, then mean": (conv(3, 6), lambda y: y.mean(-1).mean(-1), nn.Linear(6, 4), IMAGE),
    "mean of one, flattened": (conv(3, 6), lambda y: y.mean(2).flatten(1), nn.Linear(48, 4), IMAGE),
    "conv1d of an image": (conv(3, 6), lambda y: y.flatten(2), nn.Conv1d(6, 4, 3), IMAGE),
}


RESHAPING = ["view", "flatten", "reshape", "flatten by halves", "mean", "linear on tokens"]


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [(name, False) for name in (*HOMOGENEOUS, *LAYERS)] + [(name, True) for name in RESHAPING],
)
def test_the_function_stays_the_same(name: str, dynamic: bool):
    first, f, second, shape = LAYERS.get(name) or (conv(3, 6), HOMOGENEOUS[name], conv(6, 4), IMAGE)
    graph = spoil(graph_of(Between(first, f, second), *shape, dynamic=dynamic))
    before, sample = twin(graph), input_of(graph)
    (done,) = equalize(graph)
    assert unequal(before, graph, sample) <= 1e-9
    with torch.no_grad():
        assert torch.equal(before(*sample.args), graph(*sample.args)), "not a bit of float32 may change"
    assert done.scaled > 0
    assert done.rows_after < done.rows_before or done.columns_after < done.columns_before
    (pair,) = pairs(graph)
    tensors = dict(graph.named_parameters())
    ratio = channel_ranges(pair.rows(tensors)) / channel_ranges(pair.columns(tensors))
    assert bool(((ratio >= 0.5 * (1 - 1e-6)) & (ratio <= 2 * (1 + 1e-6))).all()), "not within a factor of two"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_stored_dtype_stays_exact(dtype: torch.dtype):
    graph = spoil(graph_of(nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4)).to(dtype), *IMAGE), decades=1.0)
    before = twin(graph)
    (done,) = equalize(graph)
    assert done.scaled > 0
    assert {parameter.dtype for parameter in graph.parameters()} == {dtype}
    assert unequal(before, graph, input_of(graph)) <= 1e-12


def test_scales_by_hand():
    graph = graph_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), 1, 2)
    tensors = dict(graph.named_parameters())
    with torch.no_grad():
        tensors["0.weight"].copy_(torch.tensor([[64.0, -3.0], [5.0, 10.0], [0.0, 0.0]]))
        tensors["0.bias"].copy_(torch.tensor([1.0, 2.0, 3.0]))
        tensors["2.weight"].copy_(torch.tensor([[1.0, -1.0, 5.0]]))
    (done,) = equalize(graph)
    # sqrt(64 / 1) = 8; sqrt(10 / 1) is 2^1.66, nearest to 4; a row of zeros keeps its scale.
    tensors = dict(graph.named_parameters())
    assert tensors["0.weight"].tolist() == [[8.0, -0.375], [1.25, 2.5], [0.0, 0.0]]
    assert tensors["0.bias"].tolist() == [0.125, 0.5, 3.0]
    assert tensors["2.weight"].tolist() == [[8.0, -4.0, 5.0]]
    assert done == Equalized("linear", "linear_1", 6.4, 3.2, 5.0, 2.0, 2)


def test_dead_channels_on_either_side_keep_their_scale():
    graph = graph_of(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4)), *IMAGE)
    with torch.no_grad():
        graph.get_parameter("0.weight")[0] = 0
        graph.get_parameter("2.weight")[:, 1] = 0
        graph.get_parameter("0.weight")[2] = 0
        graph.get_parameter("2.weight")[:, 2] = 0
    before = twin(graph)
    equalize(graph)
    assert all(tensor.isfinite().all() for tensor in graph.parameters())
    for name, tensor in before.named_parameters():
        kept = tensor[:3] if name.startswith("0") else tensor[:, :3] if name == "2.weight" else tensor
        now = graph.get_parameter(name)
        assert torch.equal(
            kept, now[:3] if name.startswith("0") else now[:, :3] if name == "2.weight" else now
        )


@pytest.mark.parametrize(("rows", "columns"), [(1e-38, 1e30), (1e30, 1e-38), (1e-45, 1.0), (1.0, 1e-45)])
def test_nothing_over_or_underflows(rows: float, columns: float):
    graph = graph_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 1, 4)
    with torch.no_grad():
        graph.get_parameter("0.weight").mul_(rows)
        graph.get_parameter("2.weight").mul_(columns)
    before = twin(graph)
    equalize(graph)
    for name, tensor in graph.named_parameters():
        assert tensor.isfinite().all()
        assert torch.equal(tensor == 0, before.get_parameter(name) == 0)
    assert unequal(before, graph, input_of(graph)) == 0


@pytest.mark.parametrize(
    ("row", "bias", "column"),
    [
        pytest.param([1e8, 1e-37], 1.0, [1e-8, 1e-8], id="weight"),
        pytest.param([1e-8, 1e-8], 1.0, [1e8, 1e-37], id="weight of the second"),
        pytest.param([1e8, 1.0], 1e-37, [1e-8, 1e-8], id="bias"),
        pytest.param([1e-10, 1e-10], 1e37, [1e10, 1e10], id="bias overflows"),
        pytest.param([1e8, 0.0], 0.0, [1e-8, 0.0], id="zeros are no limit"),
        pytest.param([1e20, 1e20], 1.0, [1e-10, 1e-10], id="activations"),
    ],
)
def test_the_smallest_and_the_bias_count_too(row: list[float], bias: float, column: list[float]):
    graph = graph_of(nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)), 1, 2)
    with torch.no_grad():
        graph.get_parameter("0.weight").copy_(torch.tensor([row]))
        graph.get_parameter("0.bias").fill_(bias)
        graph.get_parameter("2.weight").copy_(torch.tensor([column]).T)
    before = twin(graph)
    (done,) = equalize(graph)
    assert done.scaled == 1
    assert all(tensor.isfinite().all() for tensor in graph.parameters())
    assert unequal(before, graph, input_of(graph)) == 0
    scale = (graph.get_parameter("2.weight") / before.get_parameter("2.weight"))[0]
    assert 2.0**-32 <= scale.item() <= 2.0**32
    assert torch.equal(before.get_parameter("2.weight") * scale, graph.get_parameter("2.weight"))
    assert torch.equal(graph.get_parameter("2.weight") / scale, before.get_parameter("2.weight"))
    for name in ("0.weight", "0.bias"):
        assert torch.equal(graph.get_parameter(name) * scale, before.get_parameter(name)), name


def test_the_tensors_of_a_copy_that_shares_them_are_left_alone():
    model = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4))
    graph = spoil(graph_of(model, *IMAGE))
    shared = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert graph.get_parameter("0.weight") is model[0].weight
    equalize(graph)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in shared.items())
    assert isinstance(graph.get_parameter("0.weight"), nn.Parameter)


# ------------------------------------------------------------------------------------------ a copy


class Nested(nn.Module):
    """Arguments in a dict and by keyword, a constant, a buffer, and a layer that no scale moves to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.far = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(4, 2)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor, *, by: dict[str, Tensor]) -> dict[str, Tensor]:
        y = torch.tanh(self.b(torch.relu(self.a(x))) + self.shift)
        return {"y": self.far(y) * by["s"] + torch.tensor([0.5])}


def nested() -> tuple[fx.GraphModule, Sample]:
    torch.manual_seed(0)
    sample = Sample((torch.randn(2, 3),), {"by": {"s": torch.tensor(2.0)}})
    shapes = {"x": {0: torch.export.Dim.DYNAMIC}, "by": {"s": None}}
    model = Nested().eval()
    return torch.export.export(
        model, sample.args, dict(sample.kwargs), dynamic_shapes=shapes
    ).module(), sample


def test_an_equalized_copy_is_the_same_function_and_the_same_nodes():
    graph, sample = nested()
    spoil(graph)
    found, (done,) = equalized(graph)
    assert done.scaled > 0
    for rows in (2, 5):
        x = torch.randn(rows, 3)
        assert torch.equal(found(x, **sample.kwargs)["y"], graph(x, **sample.kwargs)["y"])
    assert unequal(graph, found, sample) <= 1e-9
    for old, new in zip(graph.graph.nodes, found.graph.nodes, strict=True):
        assert new is not old
        assert (new.name, new.op, new.target) == (old.name, old.op, old.target)
        assert new.meta.get("val") is old.meta.get("val")
    assert any(node.name == "_guards_fn" for node in found.graph.nodes)
    with pytest.raises(AssertionError, match="Guard failed"):
        found(torch.randn(2, 4), **sample.kwargs)


def test_an_equalized_copy_leaves_the_graph_alone_and_shares_what_is_not_scaled():
    graph, _ = nested()
    spoil(graph)
    parameters, code = dict(graph.named_parameters()), graph.code
    values = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    found, _ = equalized(graph)
    assert graph.code == code
    assert graph.state_dict().keys() == values.keys()
    assert all(torch.equal(graph.state_dict()[name], tensor) for name, tensor in values.items())
    assert all(graph.get_parameter(name) is parameter for name, parameter in parameters.items())
    shared = {name for name, parameter in parameters.items() if found.get_parameter(name) is parameter}
    assert shared == {"b.bias", "far.weight", "far.bias"}
    found.graph.erase_node(found.graph.output_node())
    assert graph.graph.output_node().name == "output"


def test_a_copy_without_pairs_shares_everything():
    graph = graph_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 2, 3)
    found, done = equalized(graph)
    assert done == ()
    assert found is not graph
    assert all(found.get_parameter(name) is tensor for name, tensor in graph.named_parameters())


# ------------------------------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("seed", range(4))
def test_bad_ranges_cost_less_afterwards_and_a_second_run_changes_nothing(seed: int):
    graph = spoil(graph_of(mobile(), *IMAGE), seed)
    sample, before = input_of(graph), twin(graph)
    equalize(graph)
    once = twin(graph)
    assert all(done.scaled == 0 for done in equalize(graph))
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), graph.parameters(), strict=True))
    with torch.no_grad():
        expected = before(*sample.args)
        assert torch.equal(expected, graph(*sample.args))
        worse, better = (sqnr(expected, rough(net)(*sample.args)) for net in (before, graph))
    assert better > worse + 15, (worse, better)


@pytest.mark.parametrize("seed", range(4))
def test_a_balanced_network_is_not_hurt(seed: int):
    graph = graph_of(mobile(), *IMAGE)
    sample, before = input_of(graph, seed), twin(graph)
    equalize(graph)
    with torch.no_grad():
        expected = before(*sample.args)
        plain, equal = (sqnr(expected, rough(net)(*sample.args)) for net in (before, graph))
    assert equal > plain - 1, (plain, equal)


def test_ranges_a_factor_of_two_apart_do_not_change_places_for_ever():
    # log2(2 r) - log2(r) is more than 1 in float64 for this r, so both directions would round to one step.
    graph = graph_of(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), 1, 1)
    with torch.no_grad():
        graph.get_parameter("0.weight").fill_(0.1015625)
        graph.get_parameter("1.weight").fill_(0.05078125)
    assert equalize(graph, rounds=1)[0].scaled == 0


# ------------------------------------------------------------------------------------------ the proof itself


def test_unequal_sees_what_is_not_equal():
    graph = graph_of(nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4)), *IMAGE)
    other, sample = twin(graph), input_of(graph)
    assert unequal(graph, other, sample) == 0
    with torch.no_grad():
        other.get_parameter("2.bias").mul_(1 + 1e-6)
    assert 0 < unequal(graph, other, sample) < 1e-5
    with torch.no_grad():
        other.get_parameter("2.bias").fill_(torch.nan)
    assert unequal(graph, other, sample) == float("inf")


@pytest.mark.parametrize("filling", [-1e9, float("-inf")])
def test_unequal_is_not_blind_beside_a_mask(filling):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)
            self.register_buffer("mask", torch.arange(6) < 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).masked_fill(self.mask, filling)

    graph = graph_of(Masked(), 3, 4)
    other, sample = twin(graph), input_of(graph)
    assert unequal(graph, other, sample) == 0
    with torch.no_grad():
        other.get_parameter("layer.bias").add_(0.1)
    assert unequal(graph, other, sample) > 1e-4


def test_unequal_runs_ops_that_name_a_dtype_in_float64():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).to(torch.float32) / 2**20 + torch.full((3,), 1.0, dtype=torch.float32)
            return y + torch.zeros(3).to(torch.float32) + torch.tensor([0.5])

    graph = graph_of(Named(), 2, 3)
    tensors = graph.state_dict()
    x = input_of(graph).args[0].double()
    exact = F.linear(x, tensors["a.weight"].double(), tensors["a.bias"].double()) / 2**20 + 1.5
    other = twin(graph)
    with torch.no_grad():
        other.get_parameter("a.bias").mul_(1 + 2**-10)
    # In float32 a change by 2^-30 would be rounded away.
    assert torch.equal(graph(x.float()), other(x.float()))
    expected = float(tensors["a.bias"].double().abs().max() * 2**-30 / exact.abs().max())
    assert unequal(graph, other, Sample((x,))) == pytest.approx(expected, rel=1e-3)
