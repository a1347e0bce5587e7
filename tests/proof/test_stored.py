"""Stored tensors: every bit of them is judged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from fusecli.outcome import Judgement
from fusecli.proof.stored import holds_fold
from tests.nets import chain, images
from tests.proof.nets import X, bn, changed, consistent, conv, net, right_fold

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def up(tensor: Tensor, places: int) -> None:
    """The first element moves by so many units in the last place."""
    first = tensor.view(-1)[:1]
    for _ in range(places):
        first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))


def dead(dtype: torch.dtype = torch.float32) -> Any:
    """conv -> bn -> conv2: channel 0 of bn has gamma 0, and nothing reads channel 1."""
    model = net(lambda m, x: m.conv2(m.bn(m.conv(x))), conv=conv(), bn=bn(), conv2=conv()).to(dtype)
    with torch.no_grad():
        model.bn.weight[0], model.bn.bias[0] = 0, 0
        model.conv2.weight[:, 1] = 0
    return model


WRONG: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "two_ulp_of_a_weight": ("conv.weight", lambda w: up(w[2], 2)),
    "two_ulp_of_a_bias": ("conv.bias", lambda b: up(b[2:], 2)),
    "negated_gamma": ("conv.weight", lambda w: w[2].neg_()),
    "negated_gamma_of_an_unread_channel": ("conv.weight", lambda w: w[1].neg_()),
    "dead_channel_lives": ("conv.weight", lambda w: w[0, 0, 0, 0].fill_(1e-30)),
    "nan": ("conv.weight", lambda w: w[0, 0, 0, 0].fill_(torch.nan)),
    "inf": ("conv.bias", lambda b: b[0].fill_(torch.inf)),
    "one_bit_of_a_kept_tensor": ("conv2.weight", lambda w: up(w[0, 0, 0, 0], 1)),
    "one_bit_of_an_unread_kept_weight": ("conv2.weight", lambda w: up(w[0, 1, 0, 0], 1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_stored_tensor_is_different_and_named(case: str, dtype: torch.dtype) -> None:
    key, change = WRONG[case]
    model = dead(dtype)
    x = X.to(dtype)
    judged = fusecli.verify(model, changed(right_fold(model, x=x), key, change), x)
    assert judged.judgement is Judgement.DIFFERENT
    assert key in " ".join(judged.reasons)
    assert judged.check_results["from disk"] is Judgement.DIFFERENT
    assert consistent(judged)


def test_keys_that_are_missing_or_too_many_are_named() -> None:
    model = dead()
    fused = right_fold(model)
    fused.register_buffer("extra", torch.ones(1))
    assert "extra" in " ".join(fusecli.verify(model, fused, X).reasons)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mantissa", [1.0, 1.3, 1.99])
def test_only_the_two_neighbours_hold_a_fold(dtype: torch.dtype, mantissa: float) -> None:
    below = torch.tensor([mantissa]).to(dtype)
    above = below.clone()
    up(above, 1)
    exact = below.double() * 0.75 + above.double() * 0.25
    neighbours = [below, above] if dtype is not torch.float64 else [exact]
    assert all(holds_fold(exact, stored, folded=True) for stored in neighbours)
    up(above, 1)
    assert not holds_fold(exact, above, folded=True)


def test_a_kept_tensor_that_became_narrower_is_wrong() -> None:
    value = torch.tensor([1.001], dtype=torch.float64)
    assert not holds_fold(value, value.bfloat16(), folded=False)
    assert holds_fold(value.bfloat16().double(), value.bfloat16(), folded=False)
    assert holds_fold(torch.tensor([torch.nan]).double(), torch.tensor([torch.nan]), folded=False)
    assert not holds_fold(torch.tensor([1]), torch.tensor([1.0]), folded=False)
    assert not holds_fold(torch.tensor([1]), torch.tensor([1], dtype=torch.int32), folded=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_folds_of_every_dtype_hold(dtype: torch.dtype) -> None:
    model = chain(a=conv(3, 8), b=bn(8), c=nn.ReLU(), d=conv(8, 4, bias=False), e=bn(4)).to(dtype)
    right_fold(model, ["a", "b", "c"], ["d", "e"], x=X.to(dtype))


def test_a_right_fold_of_mixed_dtypes_holds() -> None:
    model = net(lambda m, x: m.bn(m.conv(x.bfloat16()).float()), conv=conv().bfloat16(), bn=bn())
    fused = right_fold(model)
    assert fused.conv.weight.dtype is torch.bfloat16
    assert not fusecli.verify(model, changed(fused, "conv.weight", lambda w: up(w, 2)), X).equivalent


def test_state_that_is_no_tensor_is_compared_too() -> None:
    class Extra(nn.Identity):
        note = "a"

        def get_extra_state(self) -> Any:
            return {"note": self.note}

        def set_extra_state(self, state: Any) -> None:
            self.note = state["note"]

    model = net(lambda m, x: m.extra(m.bn(m.conv(x))), conv=conv(), bn=bn(), extra=Extra())
    fused = right_fold(model)
    other = copy.deepcopy(fused)
    other.extra.note = "b"
    assert "extra._extra_state" in " ".join(fusecli.verify(model, other, images(2, 3, 8, 8)).reasons)
