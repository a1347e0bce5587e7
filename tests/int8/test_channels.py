"""The worst channel: a large one hides no small one, and one that says nothing in float cries no wolf."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fusecli.int8.channels import channel_axes
from fusecli.int8.comparison import Comparison, Worst, compare
from fusecli.int8.threshold import Threshold, shortfalls
from fusecli.sample import Sample
from tests.int8.test_watching import graph_of

INF = math.inf


class Stored(nn.Module):
    """Gives the rows of a table, times 1."""

    def __init__(self, *tables: Tensor) -> None:
        super().__init__()
        for number, table in enumerate(tables):
            self.register_buffer(f"table{number}", table)
        self.count = len(tables)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [getattr(self, f"table{number}")[x] * 1 for number in range(self.count)]


def compared(float_: list[Tensor], int8: list[Tensor], parts: int = 2) -> Comparison:
    rows = torch.arange(len(float_[0]))
    graphs = [graph_of(Stored(*tables), rows[:4]) for tables in (float_, int8)]
    return compare(*graphs, [], [Sample((part,)) for part in rows.split(4)])


def table(*factors: float, shape: tuple[int, ...] = ()) -> Tensor:
    rng = torch.Generator().manual_seed(len(factors))
    return torch.randn(8, *shape, len(factors), generator=rng) * torch.tensor(factors) + torch.tensor(factors)


def test_the_number_of_a_channel_by_hand() -> None:
    x = table(2.0, 1.0)
    y = x.clone()
    y[:, 1] += 0.25
    found = compared([x], [y])
    level = 10 * math.log10(float(x[:, 1].double().square().sum()) / (8 * 0.0625))
    assert found.channel_sqnr == Worst(pytest.approx(level), "channel 1 of 2")
    one, other = x[:, 1].double(), y[:, 1].double()
    cosine = float(one @ other / (one.norm() * other.norm()))
    assert found.channel_cosine == Worst(pytest.approx(cosine), "channel 1 of 2")
    assert found.constant == ()


@pytest.mark.parametrize("factor", [1e-1, 1e-3, 1e-5])
def test_a_large_channel_hides_no_small_one(factor: float) -> None:
    x = table(1.0, 1.0, factor)
    y = x.clone()
    y[:, 2] = y[:, 2].mean()
    found = compared([x], [y])
    assert found.constant == ("channel 2 of 3",)
    assert found.channel_sqnr is not None
    assert found.channel_sqnr.place == "channel 2 of 3"
    assert found.channel_sqnr.value < 10
    if factor < 0.1:
        assert found.sqnr is not None
        assert found.sqnr > 50
    missed = shortfalls(Threshold(sqnr=20.0), found, None)
    assert missed[-1] == "one number in int8, though it varies in float: channel 2 of 3"
    assert any("the SQNR of channel 2 of 3 is" in line for line in missed)


def test_one_number_instead_of_values_that_are_alike() -> None:
    """100 to 101, and 100.5 in int8: by its power nothing is wrong, and nothing is left of it."""
    x = 100 + torch.linspace(0, 1, 8)[:, None].repeat(1, 2)
    y = x.clone()
    y[:, 0] = 100.5
    found = compared([x], [y])
    assert found.sqnr is not None
    assert found.sqnr > 40
    assert found.constant == ("channel 0 of 2",)
    assert shortfalls(Threshold(cosine=0.9), found, None) != []
    assert shortfalls(Threshold(top1=0.1), found, None) == []


QUIET = {
    "zero": torch.zeros(8),
    "one number": torch.full((8,), -0.01),
    "nearly one number": torch.full((8,), 0.01) + torch.linspace(0, 5e-6, 8),
    "less than eight bits tell": 0.01 + torch.linspace(0, 3e-5, 8),
    "next to nothing": torch.linspace(-1e-8, 1e-8, 8),
}


@pytest.mark.parametrize("values", QUIET.values(), ids=QUIET)
def test_a_channel_that_says_nothing_cries_no_wolf(values: Tensor) -> None:
    """Its error is held against the others', for its own power is nothing to lose."""
    x = torch.cat([table(1.0, 2.0), values[:, None]], 1)
    y = x + 0.001
    y[:, 2] = 0.0
    found = compared([x], [y])
    assert found.lost == ()
    assert shortfalls(Threshold(sqnr=30.0, cosine=0.99), found, None) == []
    y[:, 2] = 1.0  # an error as large as the others' values is one
    assert shortfalls(Threshold(sqnr=30.0), compared([x], [y]), None) != []


@pytest.mark.parametrize(
    ("axis", "place"), [(-1, "channel 1 of 3 of axis -1"), (-3, "channel 1 of 3 of axis -3")]
)
def test_channels_of_maps_and_of_tokens(axis: int, place: str) -> None:
    """[n, c, h, w] has its channels second, [n, t, c] last."""
    x = table(1.0, 1e-3, 1.0, shape=(3, 4)).movedim(-1, axis)
    y = x.clone()
    y.movedim(axis, -1)[..., 1] = 0
    found = compared([x], [y])
    assert (found.channel_sqnr, found.constant) == (Worst(pytest.approx(0.0), place), (place,))
    assert channel_axes(x) == [-3, -1]


def test_an_axis_that_holds_the_samples_has_no_channels() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 1).transpose(0, 1)

    x = Sample((torch.randn(3, 2),))
    batch = torch.export.Dim("batch")
    graph = torch.export.export(Turned(), x.args, dynamic_shapes=({0: batch},)).module()
    found = compare(graph, graph, [], [x, Sample((torch.randn(2, 2),))])
    assert (found.sqnr, found.channel_sqnr) == (INF, None)


def test_the_worst_of_several_outputs_is_named() -> None:
    x = [table(1.0, 1.0), table(1.0, 1e-3)]
    y = [x[0], x[1].clone()]
    y[1][:, 1] = 0
    assert compared(x, y).constant == ("channel 1 of 2 of output 1",)


@pytest.mark.parametrize("value", [math.nan, INF])
def test_what_is_not_finite_is_the_worst(value: float) -> None:
    x = table(1.0, 2.0)
    y = x.clone()
    y[3, 1] = value
    found = compared([x], [y])
    assert (found.channel_sqnr, found.channel_cosine) == (
        Worst(-INF, "channel 1 of 2"),
        Worst(-1.0, "channel 1 of 2"),
    )


@pytest.mark.parametrize("shape", [(8, 1), (8,)])
def test_rows_of_one_number_have_no_cosine(shape: tuple[int, ...]) -> None:
    """The cosine of one number is its sign; all over the samples it is one."""
    x = torch.rand(8).reshape(shape) + 0.1
    found = compared([x], [torch.full(shape, 0.6)])
    assert (found.cosine, found.worst_cosine) == (None, None)
    assert found.constant == ("channel 0 of 1",)
    (sentence, *_) = shortfalls(Threshold(cosine=0.5), found, None)
    assert "a row of the output is one number, whose cosine is its sign" in sentence
