from __future__ import annotations

import pytest
import torch
from torch import nn

from fusecli.algebra import Geometry, LinearOp, compose
from fusecli.errors import NotFoldable
from tests.algebra.grid import CASES, GROUPED_LINEAR, Case, close, each, lift, random


def pointwise(rank: int, groups: int, inputs: int, outputs: int, *, bias: bool = True) -> LinearOp:
    weight = random(groups, outputs // groups, inputs // groups, *[1] * rank)
    at = Geometry((1,) * rank, ((0, 0),) * rank, (1,) * rank)
    return LinearOp(weight, random(outputs) if bias else None, at)


def refused_for(outer: LinearOp) -> str:
    if outer.pointwise:
        return ""
    if outer.geometry.transposed:
        return "transposed-shift"
    return "padding-border" if outer.geometry.zero_bordered else ""


REFUSED = [case for case in CASES if refused_for(case.op)]
FOLDED = [case for case in CASES if not refused_for(case.op)]


@each(CASES)
def test_law_of_a_pointwise_layer_behind(case: Case) -> None:
    inner, x = case.op, case.x
    outer = pointwise(inner.rank, inner.groups, inner.out_channels, 3 * inner.groups)
    composed = compose(outer, inner)
    assert composed.geometry == inner.geometry
    assert close(composed(x), outer(inner(x)))


@each(CASES)
def test_law_of_a_pointwise_layer_without_bias_before(case: Case) -> None:
    outer, spatial = case.op, case.x.shape[2:]
    inner = pointwise(outer.rank, outer.groups, 3 * outer.groups, outer.in_channels, bias=False)
    x = random(2, inner.in_channels, *spatial)
    composed = compose(outer, inner)
    assert outer.pointwise or composed.geometry == outer.geometry
    assert (composed.bias is None) == (outer.bias is None)
    assert close(composed(x), outer(inner(x)))


@each(FOLDED)
def test_law_of_a_pointwise_layer_with_bias_before(case: Case) -> None:
    outer, spatial = case.op, case.x.shape[2:]
    inner = pointwise(outer.rank, outer.groups, 3 * outer.groups, outer.in_channels)
    x = random(2, inner.in_channels, *spatial)
    assert close(compose(outer, inner)(x), outer(inner(x)))


@each(REFUSED)
def test_an_inner_bias_is_refused_and_would_be_wrong(case: Case) -> None:
    outer, spatial = case.op, case.x.shape[2:]
    inner = pointwise(outer.rank, outer.groups, 3 * outer.groups, outer.in_channels)
    with pytest.raises(NotFoldable) as refusal:
        compose(outer, inner)
    assert refusal.value.code == refused_for(outer)
    assert inner.bias is not None
    x = random(2, inner.in_channels, *spatial)
    unbiased = compose(outer, LinearOp(inner.weight, None, inner.geometry))
    carried = (outer.weight * inner.bias.view(outer.groups, 1, -1, *[1] * outer.rank)).flatten(2).sum(2)
    bias = carried.flatten() + (0 if unbiased.bias is None else unbiased.bias)
    anyway = LinearOp(unbiased.weight, bias, unbiased.geometry)
    assert (anyway(x) - outer(inner(x))).abs().max() > 1e-3


def test_an_inner_bias_of_zero_is_no_bias() -> None:
    outer, x = lift(nn.Conv1d(4, 6, 3, padding=1)), random(2, 3, 7)
    inner = pointwise(1, 1, 3, 4, bias=False)
    inner = LinearOp(inner.weight, torch.zeros(4), inner.geometry)
    assert close(compose(outer, inner)(x), outer(inner(x)))


def test_law_of_rank_0() -> None:
    outer, x = LinearOp(random(2, 5, 3), random(10), Geometry.linear()), random(7, 8)
    assert close(compose(outer, GROUPED_LINEAR)(x), outer(GROUPED_LINEAR(x)))


def test_law_of_two_pointwise_layers_one_of_them_transposed() -> None:
    up = lift(nn.ConvTranspose2d(4, 6, 1).double())
    plain, x = pointwise(2, 1, 6, 4), random(2, 4, 3, 3)
    assert close(compose(plain, up)(x), plain(up(x)))
    assert close(compose(up, plain)(random(2, 6, 3, 3)), up(plain(random(2, 6, 3, 3))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weight_and_bias_come_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    composed = compose(pointwise(1, 1, 6, 2), lift(nn.Conv1d(4, 6, 3)), dtype)
    assert composed.bias is not None
    assert composed.weight.dtype == composed.bias.dtype == dtype


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (nn.Conv1d(6, 5, 3), nn.Conv1d(4, 6, 3)),
        (nn.Conv1d(6, 5, 1, stride=2), nn.Conv1d(4, 6, 3)),
        (nn.Conv1d(6, 5, 3), nn.Conv1d(4, 6, 1, stride=2)),
        (nn.Conv1d(6, 5, 1, padding=1), nn.Conv1d(4, 6, 3)),
    ],
    ids=["two kernels", "strided behind", "strided before", "padded behind"],
)
def test_two_layers_that_move_are_refused_and_would_be_wrong(outer: nn.Conv1d, inner: nn.Conv1d) -> None:
    outer_op, inner_op = lift(outer.double()), lift(inner.double())
    with pytest.raises(NotFoldable) as refusal:
        compose(outer_op, inner_op)
    assert refusal.value.code == "not-pointwise"
    x = random(2, 4, 9)
    expected = outer_op(inner_op(x))
    # Neither geometry alone gives outputs of the right number, whatever the weight.
    for at in (outer_op, inner_op):
        assert LinearOp(random(1, 5, 4, *at.kernel), None, at.geometry)(x).shape != expected.shape


def test_groups_that_differ_are_refused_for_the_product_has_no_blocks() -> None:
    inner, outer = lift(nn.Conv1d(4, 6, 3, groups=2).double()), pointwise(1, 1, 6, 4)
    for pair in ((outer, inner), (lift(nn.Conv1d(6, 6, 3, groups=3)), lift(nn.Conv1d(4, 6, 1, groups=2)))):
        with pytest.raises(NotFoldable) as refusal:
            compose(*pair)
        assert refusal.value.code == "grouped"
    x, nudged = torch.zeros(1, 4, 3, dtype=torch.float64), torch.zeros(1, 4, 3, dtype=torch.float64)
    nudged[:, 3] = 1
    # Two groups would keep output 0 from input 3, of group 1; outer(inner(x)) does not.
    assert not torch.equal(outer(inner(x))[:, 0], outer(inner(nudged))[:, 0])


@pytest.mark.parametrize(
    "outer", [nn.Conv1d(5, 2, 1), nn.Conv2d(6, 2, 1), nn.Linear(6, 2)], ids=["channels", "rank", "linear"]
)
def test_layers_that_do_not_fit_are_refused(outer: nn.Module) -> None:
    with pytest.raises(NotFoldable) as refusal:
        compose(lift(outer), lift(nn.Conv1d(4, 6, 3)))
    assert refusal.value.code == "shape"
