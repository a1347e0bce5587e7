"""A check that cannot fail proves nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusecli.errors import ExitCode
from fusecli.outcome import Judgement
from tests.equivalence.nets import X, bn, consistent, conv, fused, net, verdict
from tests.nets import images

BLIND = {
    "zero_inputs": (lambda m, x: m.bn(m.conv(x * 0)), {}),
    "nothing_gets_through": (lambda m, x: m.relu(m.bn(m.conv(x))), {"bn.bias": -1e6}),
    "empty_batch": (lambda m, x: m.bn(m.conv(x[:0])), {}),
    "only_a_bias": (lambda m, x: m.bn(m.conv(x)), {"conv.weight": 0.0}),
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
