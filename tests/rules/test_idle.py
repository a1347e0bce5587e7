from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from fusecli.errors import ExitCode
from tests.proof.nets import X, bn, conv, net
from tests.rules.wired import classes


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1, 1) > 0.5) if self.training else x


class Kept(nn.Dropout):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(1))


def around(module: nn.Module) -> Any:
    return net(lambda m, x: torch.tanh(m.conv(m.it(torch.relu(x)))), it=module, conv=conv())


def removed(model: nn.Module, **spec: Any) -> Any:
    return fusecli.fuse(model, X, spec={"discover": True, "remove_idle": True, **spec})


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.AvgPool2d(3, 1, 1),
        nn.AvgPool2d(1, 2),
        nn.Identity(),
        Kept(),
        nn.Sequential(nn.Dropout()),
    ],
    ids=repr,
)
def test_what_does_something_stays(module: nn.Module) -> None:
    groups = removed(around(module)).groups
    assert "it" not in {path for group in groups for path in group.modules}


def test_hooks_keep_a_module() -> None:
    model = around(nn.Dropout())
    model.it.register_forward_hook(lambda *_: None)
    assert removed(model).groups == ()


@pytest.mark.parametrize("module", [nn.Dropout(), nn.Dropout2d(0.9), DropPath(), nn.AvgPool2d(1)], ids=repr)
def test_what_does_nothing_becomes_an_identity(module: nn.Module) -> None:
    model = around(module)
    assert fusecli.fuse(model, X, discover=True).exit_code is ExitCode.NOTHING
    assert "#   it" in fusecli.plan(model, X).text.splitlines() or "it" in fusecli.plan(model, X).text
    outcome = removed(model)
    assert [(group.modules, group.rule, group.status) for group in outcome.groups] == [
        (("it",), "idle", "equivalent")
    ]
    assert classes(outcome.model, "it") == ["Identity"]
    assert outcome.model.state_dict().keys() == model.state_dict().keys()
    assert fusecli.verify(model, outcome.model, X).equivalent
    assert removed(model, exclude=["it"]).groups == ()


def test_one_that_is_part_of_another_group_stays_there() -> None:
    model = net(lambda m, x: torch.tanh(m.bn(m.drop(m.conv(x)))), conv=conv(), drop=nn.Dropout(), bn=bn())
    outcome = fusecli.fuse(model, X, spec={"groups": ["conv", "drop", "bn"], "remove_idle": True})
    assert [group.modules for group in outcome.groups] == [("conv", "drop", "bn")]
