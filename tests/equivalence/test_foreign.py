"""Models of which nobody knows how one became the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fusecli
from fusecli.outcome import Judgement, Verdict
from tests.equivalence.nets import X, bn, changed, conv, net, straight


def by_torch(model: Any) -> Any:
    other = copy.deepcopy(model)
    other.conv, other.bn = fuse_conv_bn_eval(other.conv, other.bn), nn.Identity()
    return other


def verify(model: nn.Module, other: nn.Module) -> Verdict:
    return fusecli.verify(model, other, X)


@pytest.mark.parametrize("seed", range(5))
def test_torchs_own_fold_is_equivalent_within_rounding(seed: int) -> None:
    model = straight(seed=seed)
    judged = verify(model, by_torch(model))
    assert judged.equivalent
    assert 1e-9 < judged.tolerance < 1e-5


@pytest.mark.parametrize(
    ("step", "judgement"), [(1e-3, "different"), (1e-4, "different"), (1e-8, "equivalent")]
)
def test_the_smallest_change_that_outputs_show(step: float, judgement: str) -> None:
    """float32: a gamma off by a few 1e-6 is within the rounding of the weights, one off by 1e-4 is not."""
    model = straight()
    other = by_torch(model).double()
    other.conv.weight.data[0].mul_(1 + step)
    assert str(verify(model, other.float())) == judgement


def never(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)) if x.shape[0] < 9 else m.spare(x)


BLIND = {
    "argmax": (lambda m, x: m.bn(m.conv(x)).mean((2, 3)).argmax(1), "do not notice"),
    "never_reached": (never, "never reach spare.weight, spare.bias"),
    "random": (lambda m, x: m.bn(m.conv(x)) + torch.rand(()), "disagrees with itself"),
    "nan": (lambda m, x: m.bn(m.conv(x)) * torch.nan, "returns NaN"),
    "odd": (lambda m, x: (m.bn(m.conv(x)), object()), "cannot be compared"),
}


@pytest.mark.parametrize("case", BLIND)
def test_what_outputs_cannot_show_is_inconclusive(case: str) -> None:
    wiring, reason = BLIND[case]
    model = net(wiring, conv=conv(), bn=bn(), spare=conv())
    judged = verify(model, by_torch(model))
    assert judged.judgement is Judgement.INCONCLUSIVE
    assert reason in judged.reasons[0]


def test_bfloat16_weights_are_too_coarse_for_outputs_to_prove_anything() -> None:
    model = straight()
    other = by_torch(model).bfloat16()
    assert verify(model, other).judgement is Judgement.INCONCLUSIVE


def test_a_fused_model_that_does_not_run_is_different() -> None:
    model = straight()
    other = by_torch(model)
    other.bn = bn(5)
    judged = verify(model, other)
    assert judged.judgement is Judgement.DIFFERENT
    assert "does not run" in judged.reasons[0]


@pytest.mark.parametrize("key", ["conv.weight", "conv.bias"])
def test_wrong_weights_are_different(key: str) -> None:
    model = straight()
    assert (
        verify(model, changed(by_torch(model), key, lambda w: w[0].neg_())).judgement is Judgement.DIFFERENT
    )
