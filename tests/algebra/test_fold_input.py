from __future__ import annotations

import pytest
import torch
from torch import nn

from fusecli.algebra import ChannelAffine, LinearOp, fold_input
from fusecli.algebra.blocks import BLOCK
from fusecli.errors import NotFoldable
from tests.algebra.grid import CASES, GROUPED_LINEAR, Case, affine, close, each, lift, random


def refused_for(op: LinearOp) -> str:
    if op.geometry.transposed:
        return "transposed-shift"
    return "padding-border" if op.geometry.zero_bordered else ""


FOLDED = [case for case in CASES if not refused_for(case.op)]
REFUSED = [case for case in CASES if refused_for(case.op)]


@each(FOLDED)
def test_law(case: Case) -> None:
    op, x = case.op, case.x
    f = affine(op.in_channels)
    folded = fold_input(op, f)
    assert folded.geometry == op.geometry
    assert close(folded(x), op(f(x)))


@each(REFUSED)
def test_a_shift_is_refused_and_would_be_wrong(case: Case) -> None:
    op, x = case.op, case.x
    f = affine(op.in_channels)
    with pytest.raises(NotFoldable) as refusal:
        fold_input(op, f)
    assert refusal.value.code == refused_for(op)
    assert "channel 0" in refusal.value.evidence[0]
    scale = f.scale.view(op.groups, 1, -1, *[1] * op.rank)
    shift = f.shift.view(op.groups, 1, -1, *[1] * op.rank)
    bias = (op.weight * shift).flatten(2).sum(2).flatten() + (0 if op.bias is None else op.bias)
    anyway = LinearOp(op.weight * scale, bias, op.geometry)
    assert (anyway(x) - op(f(x))).abs().max() > 1e-3


@each(REFUSED)
def test_law_of_a_scale_alone(case: Case) -> None:
    op, x = case.op, case.x
    f = affine(op.in_channels, shifted=False)
    folded = fold_input(op, f)
    assert (folded.bias is None) == (op.bias is None)
    assert close(folded(x), op(f(x)))


def test_law_of_a_grouped_linear() -> None:
    f, x = affine(8), random(5, 8)
    assert close(fold_input(GROUPED_LINEAR, f)(x), GROUPED_LINEAR(f(x)))


def test_law_of_a_transposed_conv_that_is_pointwise() -> None:
    op, f, x = lift(nn.ConvTranspose2d(4, 6, 1, groups=2)), affine(4), random(2, 4, 3, 3)
    assert close(fold_input(op, f)(x), op(f(x)))


def test_law_of_a_weight_of_several_blocks() -> None:
    op = lift(nn.Conv2d(128, 256, 3, groups=2))
    assert op.weight.numel() > BLOCK
    f, x = affine(128), random(1, 128, 4, 4)
    assert close(fold_input(op, f)(x), op(f(x)))


def test_law_of_a_row_of_several_blocks() -> None:
    inputs = 2 * BLOCK + 5
    op, f, x = lift(nn.Linear(inputs, 3)), affine(inputs), random(2, inputs)
    assert close(fold_input(op, f)(x), op(f(x)))


def test_the_result_shares_no_memory_with_the_operand() -> None:
    op = lift(nn.Conv1d(4, 6, 3, padding=1).double())
    folded = fold_input(op, affine(4, shifted=False))
    assert op.bias is not None
    assert folded.bias is not None
    assert torch.equal(folded.bias, op.bias)
    assert folded.bias.data_ptr() != op.bias.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_and_bias_come_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    folded = fold_input(lift(nn.Conv1d(3, 5, 3, bias=False).to(dtype)), affine(3), dtype)
    assert folded.bias is not None
    assert folded.weight.dtype == folded.bias.dtype == dtype


def test_other_channels_are_refused() -> None:
    with pytest.raises(NotFoldable) as refusal:
        fold_input(GROUPED_LINEAR, affine(6))
    assert refusal.value.code == "shape"


@pytest.mark.parametrize(
    ("layer", "biased"),
    [
        (nn.Conv2d(4, 6, 3, bias=False, device="meta"), True),
        (nn.Conv2d(4, 6, 3, bias=False, padding=1, device="meta"), False),
        (nn.ConvTranspose2d(4, 6, 3, bias=False, device="meta"), False),
        (nn.ConvTranspose2d(4, 6, 3, device="meta"), True),
    ],
    ids=repr,
)
def test_on_meta_a_shift_is_what_the_geometry_permits(layer: nn.Module, biased: bool) -> None:
    unknown = torch.empty(4, dtype=torch.float64, device="meta")
    folded = fold_input(lift(layer), ChannelAffine(unknown, unknown), torch.float32)
    assert folded.weight.is_meta
    assert (folded.bias is not None) == biased
