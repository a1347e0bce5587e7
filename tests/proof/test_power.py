"""A check that cannot fail proves nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from fusecli.errors import ExitCode
from fusecli.outcome import Judgement
from tests.nets import images
from tests.proof.nets import X, bn, changed, consistent, conv, fused, net, right_fold, verdict

BLIND = {
    "nothing_gets_through": (lambda m, x: m.relu(m.bn(m.conv(x))), {"bn.bias": -1e6}),
    "empty_batch": (lambda m, x: m.bn(m.conv(x[:0])), {}),
}


@pytest.mark.parametrize("case", BLIND)
def test_a_group_that_would_not_notice_a_wrong_weight_is_inconclusive(case: str) -> None:
    wiring, values = BLIND[case]
    model = net(wiring, conv=conv(), bn=bn(), relu=nn.ReLU())
    for key, value in values.items():
        model.state_dict()[key].fill_(value)
    group = ["conv", "bn", "relu"] if case == "nothing_gets_through" else ["conv", "bn"]
    outcome = fused(model, group)
    assert outcome.exit_code is ExitCode.INCONCLUSIVE
    assert "do not notice weights that are off by 1 %" in verdict(outcome).reasons[0]
    assert verdict(outcome).check_results["power"] is Judgement.INCONCLUSIVE
    assert consistent(verdict(outcome))


# What is 0 in every fold, right or wrong, is proven like any other number: by what a wrong one would do.
ZEROS: dict[str, dict[str, Any]] = {
    "gamma": {"bn.weight": ...},
    "some_gammas": {"bn.weight": [0, 2]},
    "weight": {"conv.weight": ...},
    "some_kernels": {"conv.weight": [1]},
    "pruned_channels": {"conv.weight": [0, 1], "conv.bias": [0, 1], "bn.weight": [0, 1], "bn.bias": [0, 1]},
    "pruned_layer": {"conv.weight": ..., "conv.bias": ..., "bn.weight": ..., "bn.bias": ...},
    "norm_in_front": {"first.weight": ..., "first.bias": ...},
}


@pytest.mark.parametrize("case", ZEROS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_proven_like_other_numbers(case: str, dtype: torch.dtype) -> None:
    model = net(
        lambda m, x: m.bn(m.conv(m.relu(m.first(x)))), first=bn(), relu=nn.ReLU(), conv=conv(), bn=bn()
    )
    for key, where in ZEROS[case].items():
        model.state_dict()[key][where] = 0.0
    outcome = fused(model.to(dtype), x=X.to(dtype))
    assert outcome.exit_code is ExitCode.OK, verdict(outcome).reasons
    assert consistent(verdict(outcome))
    right = outcome.model
    for key, tensor in right.state_dict(keep_vars=True).items():
        if key in ("conv.weight", "conv.bias"):
            wrong = changed(right, key, lambda w: w[0].add_(0.5))
            assert fusecli.verify(model, wrong, X.to(dtype)).judgement is Judgement.DIFFERENT, (key, tensor)


@pytest.mark.parametrize("case", ["gamma", "norm_in_front"])
def test_what_is_not_zero_beside_zeros_is_still_held_against_the_original(case: str) -> None:
    """Of other numbers (a shift is forgotten, another eps) a fold is different for what it does elsewhere."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        return m.other_bn(m.other(m.relu(m.bn(m.conv(m.relu(m.first(x)))) + x)))

    model = net(
        wiring, first=bn(), relu=nn.ReLU(), conv=conv(), bn=bn(), other=conv(bias=False), other_bn=bn()
    )
    for key, where in ZEROS[case].items():
        model.state_dict()[key][where] = 0.0
    groups = [["conv", "bn"], ["other", "other_bn"]]
    right = right_fold(model, *groups)
    assert fusecli.verify(model, right, X).equivalent
    for name in ("conv.bias", "other.bias"):
        wrong = changed(right, name, Tensor.zero_)
        assert fusecli.verify(model, wrong, X).judgement is Judgement.DIFFERENT, name
    elsewhere = copy.deepcopy(model)
    elsewhere.other_bn.eps = 1e-2
    assert fusecli.verify(model, fusecli.fuse_modules(elsewhere, groups), X).judgement is Judgement.DIFFERENT


def test_an_input_of_zeros_hides_no_weight() -> None:
    model = net(lambda m, x: m.bn(m.conv(x * 0)), conv=conv(), bn=bn())
    outcome = fused(model)
    assert outcome.exit_code is ExitCode.OK, verdict(outcome).reasons
    assert "1 of 1 groups ran and notice" in verdict(outcome).checks["power"]
    wrong = changed(outcome.model, "conv.weight", lambda w: w[0].mul_(1.001))
    assert fusecli.verify(model, wrong, X).judgement is Judgement.DIFFERENT


def test_one_call_that_notices_is_enough() -> None:
    model = net(lambda m, x: (m.bn(m.conv(x * 0)), m.bn(m.conv(x))), conv=conv(), bn=bn())
    assert fused(model).status == "fused"


GROUPS: dict[str, tuple[list[nn.Module], Tensor]] = {
    "no_affine": ([nn.BatchNorm2d(3, affine=False), nn.ReLU()], X),
    "affine": ([nn.BatchNorm2d(3), nn.ReLU()], X),
    "no_bias": ([nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()], X),
    "depthwise": ([nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3)], X),
    "linear": ([nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()], images(2, 3)),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups_with_few_weights_notice_as_well(case: str) -> None:
    modules, x = GROUPS[case]
    names = [f"m{number}" for number in range(len(modules))]

    def wiring(m: Any, y: Tensor) -> Tensor:
        for name in names:
            y = getattr(m, name)(y)
        return y

    model = net(wiring, **dict(zip(names, modules, strict=True)))
    outcome = fused(model, names, x=x)
    assert outcome.status == "fused", verdict(outcome).reasons


def test_untrained_statistics_are_called_out() -> None:
    model = nn.Sequential(conv(), bn()).eval()
    outcome = fused(model, ["0", "1"])
    assert [entry.where for entry in outcome.ledger if entry.kind == "statistics"] == ["1"]
    assert torch.equal(model[1].running_var, torch.ones(3))
