"""fusecli.plan and fuse(discover=True): what a run offers, taken or only told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fusecli
from fusecli.errors import ExitCode, UsageError
from fusecli.outcome import Outcome, Proposal
from fusecli.spec import Spec
from tests import nets

X = nets.images(2, 3, 9, 8)
PAIRS = [("conv1", "bn1"), ("conv2", "bn2")]


def left(found: Proposal | Outcome) -> dict[str, str]:
    return {norm.module: norm.code for norm in found.unfused}


def taken(outcome: Outcome) -> list[tuple[str, ...]]:
    return [group.modules for group in outcome.groups]


def acted() -> Any:
    """conv -> relu -> bn -> relu, before a pair."""
    return nets.chain(
        conv=nn.Conv2d(3, 6, 3),
        relu=nn.ReLU(),
        bn=nn.BatchNorm2d(6),
        again=nn.ReLU(),
        c=nn.Conv2d(6, 4, 1),
        n=nn.BatchNorm2d(4),
    )


def test_plan_offers_what_fuse_takes() -> None:
    net = nets.two_pairs()
    before = copy.deepcopy(net.state_dict())
    proposal = fusecli.plan(net, X)
    assert list(proposal.groups) == PAIRS
    assert left(proposal) == {}
    assert proposal.text == "groups:\n  - [conv1, bn1]\n  - [conv2, bn2]\n"
    assert "op calls of one forward" in proposal.recording
    outcome = fusecli.fuse(net, X, groups=[list(group) for group in proposal.groups])
    assert (outcome.status, taken(outcome)) == ("fused", PAIRS)
    # The model was only looked at.
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_discover(form: Any, train: bool) -> None:
    net = nets.two_pairs().train(train)
    outcome = fusecli.fuse(net, form(X), discover=True)
    assert (outcome.status, outcome.exit_code, taken(outcome)) == ("fused", ExitCode.OK, PAIRS)
    assert fusecli.verify(net, outcome.model, X).equivalent
    assert net.training is train
    assert isinstance(net.bn1, nn.BatchNorm2d)


def test_quant_takes_the_relu() -> None:
    expected = [("conv1", "bn1", "relu1"), ("conv2", "bn2")]
    assert list(fusecli.plan(nets.two_pairs(), X, target="quant").groups) == expected
    outcome = fusecli.fuse(nets.two_pairs(), X, discover=True, target="quant")
    assert (outcome.status, taken(outcome)) == ("fused", expected)


def test_exclude() -> None:
    proposal = fusecli.plan(nets.two_pairs(), X, exclude=["conv1"])
    assert (list(proposal.groups), left(proposal)) == (PAIRS[1:], {"bn1": "excluded"})
    outcome = fusecli.fuse(nets.two_pairs(), X, spec={"discover": True, "exclude": ["bn1"]})
    assert (taken(outcome), left(outcome)) == (PAIRS[1:], {"bn1": "excluded"})


def test_groups_come_first() -> None:
    listed = ["conv1", "bn1", "relu1"]
    outcome = fusecli.fuse(nets.two_pairs(), X, groups=listed, discover=True)
    assert (outcome.status, taken(outcome)) == ("fused", [tuple(listed), PAIRS[1]])
    # Only told, where nobody asked for more.
    outcome = fusecli.fuse(nets.two_pairs(), X, groups=listed)
    assert (taken(outcome), left(outcome)) == ([tuple(listed)], {"bn2": "not-listed"})


@pytest.mark.parametrize("discover", [None, False, True])
def test_the_argument_wins_over_the_spec(discover: bool | None) -> None:
    for said in (False, True):
        outcome = fusecli.fuse(nets.two_pairs(), X, spec=Spec(discover=said), discover=discover)
        wanted = said if discover is None else discover
        assert len(outcome.groups) == (2 if wanted else 0)


def test_what_is_left_says_why() -> None:
    proposal = fusecli.plan(acted(), X)
    assert (list(proposal.groups), left(proposal)) == ([("c", "n")], {"bn": "no-linear-producer"})
    assert "aten.relu in relu" in proposal.unfused[0].reason
    said = proposal.text.splitlines()
    assert said[:2] == ["groups:", "  - [c, n]"]
    assert said[-1] == "#     bn (BatchNorm2d)"


def test_nothing_can_be_folded() -> None:
    net = nets.chain(relu=nn.ReLU(), bn=nn.BatchNorm2d(3))
    assert fusecli.plan(net, X).groups == ()
    assert fusecli.plan(net, X).text.startswith("groups: []\n")
    outcome = fusecli.fuse(net, X, discover=True)
    assert (outcome.status, outcome.exit_code) == ("nothing to fuse", ExitCode.NOTHING)
    assert left(outcome) == {"bn": "no-linear-producer"}


def test_numbers_that_forbid_a_discovered_fold() -> None:
    net = nets.two_pairs()
    net.bn1.running_var[0] = -1.0
    assert left(fusecli.plan(net, X)) == {"bn1": "bad-statistics"}
    outcome = fusecli.fuse(net, X, discover=True)
    assert (taken(outcome), left(outcome)) == (PAIRS[1:], {"bn1": "bad-statistics"})
    outcome = fusecli.fuse(net, X, groups=["conv1", "bn1"], discover=True)
    assert (outcome.status, [no.code for no in outcome.refused]) == ("refused", ["bad-statistics"])
    assert left(outcome) == {"bn1": "bad-statistics", "bn2": "held-back"}


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(UsageError, match="expected input"):
        fusecli.plan(nets.two_pairs(), X[:, :1])
    with pytest.raises(UsageError, match="expected input"):
        fusecli.fuse(nets.two_pairs(), X[:, :1], discover=True)


class Alias(nn.Module):
    """One convolution under two names, each before a norm of its own; and a tie that is nobody's business."""

    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.n1, self.n2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head, self.tail = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.tail.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.tail(torch.relu(self.head(torch.relu(self.n2(self.b(torch.relu(self.n1(self.a(x)))))))))


@pytest.mark.parametrize("how", [{"discover": True}, {"groups": [["a", "n1"], ["b", "n2"]]}])
def test_clone(how: dict[str, Any]) -> None:
    net = nets.randomise(Alias(), 0)
    refused = fusecli.fuse(net, X, **how)
    codes = [no.code for no in refused.refused] or [*left(refused).values()]
    assert (refused.model is None or not taken(refused), {*codes}) == (True, {"shared-module"})
    assert net.a is net.b
    outcome = fusecli.fuse(net, X, shared="clone", **how)
    assert (outcome.status, taken(outcome)) == ("fused", [("a", "n1"), ("b", "n2")])
    assert [entry.where for entry in outcome.ledger if entry.kind == "tie"] == ["a", "b"]
    assert outcome.model.a is not outcome.model.b
    assert outcome.model.tail.weight is outcome.model.head.weight
    # The model itself keeps its ties.
    assert net.a is net.b


def test_a_norm_behind_two_layers() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> Any:
            return self.bn(self.a(x)) * self.bn(self.b(x))

    net = nets.randomise(Joined(), 0)
    both = [("a", "bn"), ("b", "bn")]
    assert list(fusecli.plan(net, X).groups) == both
    for how in ({"discover": True}, {"groups": [list(group) for group in both]}):
        assert taken(fusecli.fuse(net, X, **how)) == both
    assert [no.code for no in fusecli.fuse(net, X, groups=["a", "bn"]).refused] == ["shared-module"]
