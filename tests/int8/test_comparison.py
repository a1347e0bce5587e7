from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fusecli.int8.comparison import Comparison, Likeness, Worst, compare
from fusecli.int8.numbers import cosine, sqnr
from fusecli.int8.watching import node_outputs
from fusecli.sample import Sample
from tests.int8.test_numbers import INF, NAN, t
from tests.int8.test_watching import Nets, float_and_int8, graph_of


@pytest.fixture(scope="module")
def nets() -> Nets:
    return float_and_int8()


class Given(nn.Module):
    """Returns what it is told, so that the numbers are known; the input picks the row."""

    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        for i, output in enumerate(outputs):
            self.register_buffer(f"out{i}", output)
        self.count = len(outputs)

    def forward(self, x: Tensor) -> Any:
        return {
            "first": self.out0[x] * 1,
            "rest": [getattr(self, f"out{i}") * 1 for i in range(1, self.count)],
        }


def given(*outputs: Tensor) -> fx.GraphModule:
    return graph_of(Given(*outputs), torch.tensor([0, 1]))


def whole(found: Comparison) -> Comparison:
    """Without what it says of single channels."""
    return replace(found, channel_sqnr=None, channel_cosine=None)


CHANNEL = "channel 3 of 4"
ROWS = [Sample((torch.tensor([0, 1]),)), Sample((torch.tensor([2, 3]),))]


def test_compare_by_hand_over_two_samples():
    reference = given(t([10.0, 0.0], [10.0, 0.0], [0.0, 10.0], [0.0, 10.0]))
    int8 = given(t([10.0, 1.0], [10.0, 1.0], [1.0, 10.0], [11.0, 10.0]))
    found = compare(reference, int8, ["mul"], ROWS)
    # signal 400, noise 1 + 1 + 1 + 121; rows: 10 / sqrt(101) three times, 10 / sqrt(221)
    rows = [10 / math.sqrt(101)] * 3 + [10 / math.sqrt(221)]
    level = 10 * math.log10(400 / 124)
    assert found.sqnr == pytest.approx(level)
    assert found.cosine == pytest.approx(sum(rows) / 4)
    assert found.worst_cosine == pytest.approx(rows[3])
    assert found.top1 == 0.75
    assert found.samples == 2
    # a unit is one vector over all samples: 400 / sqrt(400 * (101 * 3 + 221))
    assert found.units == (Likeness("mul", pytest.approx(level), pytest.approx(400 / math.sqrt(400 * 524))),)


def test_compare_takes_the_worst_floating_leaf_and_leaves_integers_out():
    reference = given(torch.eye(4), torch.ones(3, 2), torch.arange(3))
    int8 = given(torch.eye(4), t([1.0, 1.0], [1.0, 1.0], [1.0, -1.0]), torch.arange(3) + 1)
    found = compare(reference, int8, [], ROWS[:1])
    assert found.sqnr == pytest.approx(10 * math.log10(6 / 4))
    assert found.cosine == pytest.approx(2 / 3)
    assert found.worst_cosine == 0
    assert found.top1 == 1
    assert found.units == ()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_value_that_is_not_finite_is_the_worst_there_is(bad: float):
    wrong = torch.eye(4)
    wrong[3, 3] = bad
    found = compare(given(torch.eye(4)), given(wrong), ["mul"], ROWS)
    assert (found.channel_sqnr, found.channel_cosine) == (Worst(-INF, CHANNEL), Worst(-1.0, CHANNEL))
    assert whole(found) == Comparison((Likeness("mul", -INF, -1.0),), -INF, -1.0, -1.0, 0.75, 2)


def test_equal_graphs_have_the_best_there_is(nets: Nets):
    found = compare(nets[0], nets[0], ["relu"], [nets[2]])
    assert found.channel_sqnr == Worst(INF, "channel 0 of 5")
    assert whole(found) == Comparison((Likeness("relu", INF, 1.0),), INF, 1.0, 1.0, 1.0, 1)


def test_a_model_without_floating_or_class_scores_has_none():
    class Picks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    graph, sample = graph_of(Picks(), torch.eye(3)), Sample((torch.eye(3),))
    assert compare(graph, graph, [], [sample]) == Comparison((), None, None, None, None, 1)


def test_an_empty_leaf_says_nothing():
    class Empty(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 1, x[:0] * 1

    graph, sample = graph_of(Empty(), torch.eye(3)), Sample((torch.eye(3),))
    assert whole(compare(graph, graph, [], [sample])) == Comparison((), INF, 1.0, 1.0, 1.0, 1)


def test_compare_of_an_int8_graph(nets: Nets):
    graph, int8, sample = nets
    found = compare(graph, int8, ["relu", "linear"], [sample, sample])
    assert [unit.output for unit in found.units] == ["relu", "linear"]
    assert all(20 < unit.sqnr < 80 and 0.99 < unit.cosine < 1 for unit in found.units)
    expected, value = (net(*sample.args).detach() for net in (graph, int8))
    assert found.sqnr == pytest.approx(sqnr(expected, value))
    assert found.sqnr == pytest.approx(found.units[1].sqnr), "the output is the value behind its quantization"
    assert found.cosine == pytest.approx(cosine(expected, value))
    own = node_outputs(graph, ["relu"], sample)["relu"], node_outputs(int8, ["relu"], sample)["relu"]
    assert found.units[0].sqnr == pytest.approx(sqnr(*own))


def test_compare_refuses_what_means_nothing(nets: Nets):
    with pytest.raises(ValueError, match="no samples"):
        compare(nets[0], nets[1], [], [])
    with pytest.raises(ValueError, match=r"\[2, 4\] cannot be compared with \[2, 3\]"):
        compare(given(torch.eye(4)), given(torch.ones(4, 3)), [], ROWS)
