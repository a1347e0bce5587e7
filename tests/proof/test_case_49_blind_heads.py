"""Heads that show nothing of what goes on before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusecli
from fusecli.outcome import Judgement
from tests.proof.nets import (
    X,
    bn,
    changed,
    consistent,
    conv,
    fused,
    judged,
    net,
    right_fold,
    straight,
    verdict,
)

HEADS = {
    "argmax": lambda y: y.mean((2, 3)).argmax(1),
    "one_argmax": lambda y: (y.mean((1, 2, 3)) > -1e9).long(),
    "sigmoid": lambda y: (y + 1e4).sigmoid(),
    "dead_relu": lambda y: (-y - 1).relu(),
    "constant": lambda y: torch.ones(3),
}


@pytest.mark.parametrize("head", HEADS)
def test_case_49_a_right_fold_is_equivalent(head: str) -> None:
    outcome = fused(straight(HEADS[head]), ["conv", "bn", "relu"])
    assert outcome.status == "fused", verdict(outcome)
    assert consistent(verdict(outcome))


@pytest.mark.parametrize("head", HEADS)
def test_case_49_a_wrong_fold_is_different(head: str) -> None:
    model = straight(HEADS[head])
    right = right_fold(model, ["conv", "bn", "relu"])
    wrong = changed(right, "conv.0.weight", lambda w: w[0].neg_())
    assert fusecli.verify(model, wrong, X).judgement is Judgement.DIFFERENT
    right.conv[1].forward = lambda x: x  # the activation is gone; no tensor says so
    found = fusecli.verify(model, right, X)
    assert (found.judgement, found.first_different) == (Judgement.DIFFERENT, ("conv", "bn", "relu"))
    assert consistent(found)


@pytest.mark.parametrize("head", HEADS)
def test_case_49_a_second_reader_is_seen_behind_the_head(head: str) -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return HEADS[head](m.bn(y).relu() + 1e-3 * y)

    found = judged(net(wiring, conv=conv(), bn=bn()))
    assert (found.judgement, found.first_different) == (Judgement.DIFFERENT, ("conv", "bn"))
    assert consistent(found)


def test_case_49_rounding_of_an_argmax_is_no_drift() -> None:
    # Two equal logits: which of them is larger is a matter of the last bit, in every dtype but float64.
    model = straight(lambda y: torch.stack([y * 0.1 * 3, y * 0.3], 1).argmax(1))
    outcome = fused(model, ["conv", "bn", "relu"], x=X.repeat(8, 1, 1, 1))
    assert verdict(outcome).drift is None
    assert "not measured" in verdict(outcome).checks["drift"]
    assert "drift" not in " ".join(verdict(outcome).reasons)


def test_case_49_a_distance_of_zero_is_zero_but_for_rounding() -> None:
    model = straight(lambda y: 1 - torch.cosine_similarity(y.flatten(1), 3 * y.flatten(1)))
    assert fused(model, ["conv", "bn", "relu"]).status == "fused"


@pytest.mark.parametrize("op", [torch.sqrt, torch.log, lambda y: torch.clamp(y, min=-1e-3).rsqrt()])
def test_case_49_a_second_reader_that_breaks_behind_the_head_is_seen(op: Any) -> None:
    """What is positive in the original, and negative once it is scaled by a negative gamma, ends in NaN."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x.abs())
        z = m.bn(y)
        op(y)
        return z.mean((2, 3)).argmax(1)

    model = net(wiring, conv=conv(), bn=bn())
    with torch.no_grad():
        model.conv.weight.abs_()
        model.conv.bias.abs_()
    found = judged(model)
    assert (found.judgement, found.first_different) == (Judgement.DIFFERENT, ("conv", "bn"))
    assert consistent(found)
