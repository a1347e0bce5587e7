"""Rounding: a right fold is never failed for it, and a model that drifts is not excused by it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from fusecli.outcome import Judgement
from fusecli.proof.noise import drifts, tolerance
from tests.nets import images
from tests.proof.nets import PAIR, X, bn, consistent, conv, fused, net, right_fold, straight, verdict


def cancelling(mean: float, var: float) -> Any:
    """A bias and the running mean are both large and cancel; what is left has the size `var` ** 0.5."""
    model = net(lambda m, x: m.bn(m.conv(x)).relu(), conv=conv(), bn=bn())
    with torch.no_grad():
        model.conv.weight.mul_(0.2 * var**0.5)
        model.conv.bias.fill_(mean)
        model.bn.running_mean.copy_(model.conv.bias + torch.tensor([0.3, -0.2, 0.1]) * var**0.5)
        model.bn.running_var.fill_(var)
    return model


@pytest.mark.parametrize("var", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("mean", [1e3, 1e4, 1e5, 1e6])
def test_case_51_huge_mean_and_tiny_variance(mean: float, var: float) -> None:
    model = cancelling(mean, var)
    right = right_fold(model)
    right.conv.weight.data[1].mul_(1 + 1e-4)
    assert not fusecli.verify(model, right, X).equivalent


def test_case_51_a_noisy_network_passes_and_its_wrong_folds_do_not() -> None:
    def amplifying(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        return ((y + 1e4) - 1e4) * 1e3  # float32 keeps three digits of it

    model = net(amplifying, conv=conv(), bn=bn())
    outcome = fused(model)
    judged = verdict(outcome)
    assert judged.equivalent
    assert judged.noise_floor is not None
    assert judged.noise_floor > 1e-5
    model.bn.eps = 1e-3
    assert fusecli.verify(model, outcome.model, X).judgement is Judgement.DIFFERENT


def test_case_51_one_number_may_be_right_by_luck() -> None:
    """At seed 18 the original's own error is 10 times smaller than that of its right fold."""
    for seed in range(25):
        model = net(lambda m, x: product(m.bn(m.conv(x))), seed, conv=conv(), bn=bn())
        outcome = fused(model, x=images(1, 3, 12, 12, seed=seed))
        assert outcome.status == "fused", (seed, verdict(outcome))


def product(y: Tensor) -> Tensor:
    return (y @ y @ y @ y @ y).sum((1, 2, 3))


def test_an_output_of_zero_has_no_relative_error() -> None:
    model = straight(lambda y: ((y - y.roll(1, -1)) * 0.01).sum((1, 2, 3)))
    outcome = fused(model, ["conv", "bn", "relu"])
    assert outcome.status == "fused", verdict(outcome)
    assert verdict(outcome).drift is None


def test_the_line_rises_with_the_noise_but_never_to_where_wrong_folds_start() -> None:
    assert tolerance(None, torch.float32) == tolerance(1e-6, torch.float32) == 1e-9
    assert 1e-9 < tolerance(0.1, torch.float32) < 1e-7
    assert tolerance(1e9, torch.float32) == 1e-6
    assert tolerance(1.0, torch.bfloat16) == 1e-9


def test_drift_is_held_against_the_originals_own_error() -> None:
    assert drifts(1.1e-4, 1e-5, torch.float32)
    assert not drifts(0.9e-4, 1e-5, torch.float32)
    assert drifts(float("nan"), 1e-5, torch.float32)
    assert drifts(float("inf"), 1e-5, torch.float32)
    assert not drifts(1e-6, 0.0, torch.float32)  # an exact original is granted the rounding of its dtype
    assert not drifts(5e-12, 0.0, torch.float64)


class Coarse(nn.Identity):
    """Exact in float64; in any other dtype it loses digits."""

    def __init__(self, digits: float) -> None:
        super().__init__()
        self.digits = digits

    def forward(self, x: Tensor) -> Tensor:
        return x if x.dtype is torch.float64 else (x + self.digits) - self.digits


@pytest.mark.parametrize(("digits", "status"), [(1.0, "equivalent"), (1e5, "different")])
def test_a_model_that_is_right_in_float64_only_drifts(digits: float, status: str) -> None:
    model = straight()
    right = right_fold(model)
    right.bn = Coarse(digits)
    judged = fusecli.verify(model, right, X)
    assert str(judged) == status
    if status == "different":
        assert judged.check_results["semantic"] is Judgement.EQUIVALENT
        assert judged.checks["drift"].endswith("too far")
    assert consistent(judged)


class Overflowing(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.dtype is torch.float64 else (x * 3e38) / 3e38


@pytest.mark.parametrize("blind", [False, True])
def test_a_model_that_overflows_in_its_own_dtype_is_different(blind: bool) -> None:
    model = straight((lambda y: y.argmax(1)) if blind else (lambda y: y))
    right = right_fold(model)
    right.bn = Overflowing()
    judged = fusecli.verify(model, right, X)
    assert judged.check_results["drift"] is Judgement.DIFFERENT
    assert consistent(judged)


def test_an_original_that_overflows_itself_proves_nothing() -> None:
    outcome = fused(net(lambda m, x: m.bn(m.conv(x)) * 1e5, conv=conv(), bn=bn()).half(), x=X.half())
    assert "not finite in the stored dtype" in " ".join(verdict(outcome).reasons)
    assert outcome.status == "inconclusive"
    assert consistent(verdict(outcome))


def test_a_fused_model_that_does_not_run_in_its_own_dtype_is_different() -> None:
    model = straight()
    right = copy.deepcopy(right_fold(model, PAIR))
    right.bn.forward = lambda x: x if x.dtype is torch.float64 else x @ "no"
    judged = fusecli.verify(model, right, X)
    assert judged.judgement is Judgement.DIFFERENT
    assert "raises" in " ".join(judged.reasons)
    assert consistent(judged)
