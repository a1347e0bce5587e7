"""The meaning of a LinearOp is what torch computes."""

from __future__ import annotations

import pytest
import torch

from fusecli.algebra import Geometry, LinearOp
from fusecli.errors import NotFoldable
from tests.algebra.grid import CASES, GROUPED_LINEAR, Case, close, each, random


# torch says, once, that "same" with an even kernel pads a copy; it does, and so does the LinearOp.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@each(CASES)
def test_meaning_is_the_torch_layer(case: Case) -> None:
    with torch.no_grad():
        assert close(case.op(case.x), case.module(case.x))


def test_a_grouped_linear_maps_each_group_by_itself() -> None:
    x, weight, bias = random(5, 8), GROUPED_LINEAR.weight, GROUPED_LINEAR.bias
    assert bias is not None
    expected = torch.cat([x[:, :4] @ weight[0].T, x[:, 4:] @ weight[1].T], 1) + bias
    assert close(GROUPED_LINEAR(x), expected)


def test_meaning_of_a_narrow_layer_is_float64() -> None:
    half = LinearOp(torch.full((1, 1, 3), 0.1, dtype=torch.float16), None, Geometry.linear())
    y = half(torch.full((1, 3), 0.1, dtype=torch.float16))
    # 0.1 in float16 is 1638/16384; its square has no float16, so any step in float16 would show.
    assert y.dtype == torch.float64
    assert y.item() == 3 * (1638 / 16384) ** 2


def test_a_value_carries_no_autograd_history() -> None:
    op = LinearOp(
        torch.ones(1, 2, 2, requires_grad=True), torch.ones(2, requires_grad=True), Geometry.linear()
    )
    assert op.bias is not None
    assert not op.weight.requires_grad
    assert not op.bias.requires_grad


@pytest.mark.parametrize(
    ("weight", "bias", "geometry", "code"),
    [
        (torch.ones(2, 2), None, Geometry.linear(), "shape"),
        (torch.ones(1, 2, 2), None, Geometry((1,), ((0, 0),), (1,)), "shape"),
        (torch.ones(1, 2, 2), torch.ones(3), Geometry.linear(), "shape"),
        (torch.ones(1, 2, 2), torch.ones(2, 1), Geometry.linear(), "shape"),
        (torch.ones(1, 2, 2, dtype=torch.int8), None, Geometry.linear(), "dtype"),
        (torch.ones(1, 2, 2), torch.ones(2, dtype=torch.int32), Geometry.linear(), "dtype"),
    ],
)
def test_illegal_values_cannot_be_constructed(
    weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, code: str
) -> None:
    with pytest.raises(NotFoldable) as refusal:
        LinearOp(weight, bias, geometry)
    assert refusal.value.code == code


def test_an_input_of_other_rank_or_channels_is_refused() -> None:
    for shape in [(2, 7), (2, 8, 1)]:
        with pytest.raises(ValueError, match="x is"):
            GROUPED_LINEAR(random(*shape))


def test_pointwise() -> None:
    one = torch.ones(1, 2, 2, 1)
    plain = Geometry((1,), ((0, 0),), (1,))
    assert LinearOp(one, None, plain).pointwise
    assert LinearOp(one, None, Geometry((1,), ((0, 0),), (3,))).pointwise
    assert LinearOp(one, None, Geometry((1,), ((0, 0),), (1,), transposed=True)).pointwise
    assert GROUPED_LINEAR.pointwise
    assert not LinearOp(torch.ones(1, 2, 2, 2), None, plain).pointwise
    assert not LinearOp(one, None, Geometry((2,), ((0, 0),), (1,))).pointwise
    assert not LinearOp(one, None, Geometry((1,), ((0, 1),), (1,))).pointwise
    assert not LinearOp(one, None, Geometry((1,), ((0, 0),), (2,), True, (1,))).pointwise
