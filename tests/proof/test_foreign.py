"""Models of which nobody knows how one became the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import fusecli
from fusecli.outcome import Judgement, Verdict
from tests.nets import images
from tests.proof.nets import X, bn, changed, conv, net, straight


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


# Masked logits and the like: what stands beside the number that is wrong.
MASK = torch.arange(5) < 3
HIDING = {
    "filled": lambda y: y.masked_fill(~MASK, -1e9),
    "filled_with_infinity": lambda y: y.masked_fill(~MASK, -torch.inf),
    "added": lambda y: y + torch.where(MASK, 0.0, -1e9),
    "filled_by_rows": lambda y: torch.where(torch.eye(6, 5) > 0, -1e9, y),
    "added_by_rows": lambda y: y + torch.where(torch.eye(6, 5) > 0, -1e9, 0.0),
    "scaled_channels": lambda y: y * torch.tensor([1.0, 1.0, 1e9, 1e6, 1e6]),
    "another_leaf": lambda y: (y, 1e9 * y),
    "images": lambda y: (y * torch.tensor([1.0, 1.0, 1e9, 1e6, 1e6]))[..., None, None].expand(-1, -1, 2, 2),
}


def masked(head: Any, seed: int = 0) -> Any:
    def wiring(m: Any, x: Tensor) -> Any:
        return head(m.head(m.norm(m.body(x)).relu()))

    return net(wiring, seed, body=nn.Linear(4, 8), norm=nn.BatchNorm1d(8), head=nn.Linear(8, 5))


def folded(model: Any) -> Any:
    other = copy.deepcopy(model)
    other.body, other.norm = fuse_linear_bn_eval(other.body, other.norm), nn.Identity()
    return other


@pytest.mark.parametrize("case", HIDING)
def test_nothing_hides_behind_a_huge_number(case: str) -> None:
    x = images(6, 4)
    for seed in range(5):
        model = masked(HIDING[case], seed)
        right = folded(model)
        judged = fusecli.verify(model, right, x)
        assert judged.equivalent, (seed, judged.reasons)
        for change in (lambda w: w[1].mul_(-3.0), lambda w: w[1].mul_(1 + 1e-3)):
            for key in ("head.weight", "head.bias"):
                judged = fusecli.verify(model, changed(right, key, change), x)
                assert judged.judgement is Judgement.DIFFERENT, (seed, key, judged.reasons)
                assert "output" in judged.reasons[0]


def test_each_leaf_has_to_notice() -> None:
    """A second head that shows nothing of its weights is not proven by the first."""

    def wiring(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        return {"shown": y, "saturated": (m.spare(y).mean((2, 3)) * 1e-3 + 1e3).sigmoid()}

    model = net(wiring, conv=conv(), bn=bn(), spare=conv())
    judged = verify(model, by_torch(model))
    assert judged.judgement is Judgement.INCONCLUSIVE
    assert judged.reasons[0] == "output['saturated'] does not notice weights that are off by 1 %"


CONSTANT = {
    "input": lambda y, x: (y, x * 2),
    "anchors": lambda y, x: (y, torch.arange(4.0)),
    "integers": lambda y, x: (y, y.mean((2, 3)).argmax(1)),
    "empty": lambda y, x: (y, y[:0]),
    "number": lambda y, x: (y, float(y.mean())),
    "cancelled": lambda y, x: torch.stack([y, y * 0.3 * 10 - y * 3 + 1e-14, y * 1e-8]).movedim(0, -1),
}


@pytest.mark.parametrize("case", CONSTANT)
def test_what_no_weight_could_change_needs_no_power(case: str) -> None:
    model = net(lambda m, x: CONSTANT[case](m.relu(m.bn(m.conv(x))), x), conv=conv(), bn=bn(), relu=nn.ReLU())
    judged = verify(model, by_torch(model))
    assert judged.equivalent, judged.reasons


def test_zero_but_for_rounding_is_not_different() -> None:
    model = straight(lambda y: (y, 1 - torch.cosine_similarity(y.flatten(1), 3 * y.flatten(1))))
    judged = verify(model, by_torch(model))
    assert judged.judgement is Judgement.INCONCLUSIVE
    assert judged.reasons[0] == "output[1] does not notice weights that are off by 1 %"


def test_integers_that_rounding_decides_are_not_different() -> None:
    """Two equal logits: which of them is the larger is a matter of the last bit."""
    model = straight(lambda y: (y, torch.stack([y * 0.1 * 3, y * 0.3], 1).argmax(1)))
    assert verify(model, by_torch(model)).judgement is not Judgement.DIFFERENT


def test_zero_gammas_are_no_obstacle() -> None:
    model = straight()
    model.bn.weight.data.zero_()
    assert verify(model, by_torch(model)).equivalent


def test_thousands_of_channels_are_each_within_rounding() -> None:
    """Of many channels one lies still in each of a few draws: its own rounding is no error for that."""
    model = net(lambda m, x: m.norm(m.body(x)), body=nn.Linear(16, 4000), norm=nn.BatchNorm1d(4000))
    other = copy.deepcopy(model)
    other.body, other.norm = fuse_linear_bn_eval(other.body, other.norm), nn.Identity()
    judged = fusecli.verify(model, other, images(1, 16))
    assert judged.judgement is not Judgement.DIFFERENT, judged.reasons


def test_a_scale_that_was_rounded_once_is_no_error() -> None:
    """torch multiplies a whole channel with one rounded number, which numbers of one sign add up."""
    model = net(lambda m, x: m.norm(m.body(x)), body=nn.Linear(8000, 64), norm=nn.BatchNorm1d(64))
    model.body.weight.data.abs_()
    other = copy.deepcopy(model)
    other.body, other.norm = fuse_linear_bn_eval(other.body, other.norm), nn.Identity()
    judged = fusecli.verify(model, other, images(1, 8000).abs())
    assert judged.equivalent, judged.reasons
