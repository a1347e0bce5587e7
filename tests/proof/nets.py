"""Networks whose forward is written in the test, and the words to judge them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fusecli
from fusecli.engine import Group
from fusecli.outcome import Evidence, GroupReport, Judgement, Outcome, Verdict
from fusecli.pipeline.fold import plan_fold
from fusecli.pipeline.prove import Trials, prove_in_memory
from fusecli.sample import Sample
from fusecli.source.resolve import in_memory
from fusecli.spec import Spec
from tests.nets import images, randomise

X = images(2, 3, 8, 8)
PAIR = ["conv", "bn"]


class Net(nn.Module):
    """Modules by name, and a function of (self, x) that says how they are wired."""

    def __init__(self, wiring: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.wiring = wiring
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wiring(self, *args, **kwargs)


def net(wiring: Callable[..., Any], seed: int = 0, **modules: Any) -> Any:
    """A randomised network in eval mode."""
    return randomise(Net(wiring, **modules), seed)


def conv(inputs: int = 3, outputs: int = 3, **attributes: Any) -> nn.Conv2d:
    """3x3, same size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, **attributes)


def bn(channels: int = 3, **attributes: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **attributes)


def straight(head: Callable[[Tensor], Any] = lambda y: y, seed: int = 0) -> Any:
    """conv -> bn -> relu -> head."""
    return net(lambda m, x: head(m.relu(m.bn(m.conv(x)))), seed, conv=conv(), bn=bn(), relu=nn.ReLU())


def fused(model: nn.Module, *groups: list[str], x: Any = X) -> Outcome:
    return fusecli.fuse(model, x, groups=list(groups or [PAIR]))


def verdict(outcome: Outcome) -> Verdict:
    assert outcome.verification is not None
    return outcome.verification


def judged(model: nn.Module, *groups: list[str], x: Any = X) -> Verdict:
    """What the verifier says of a fold that no audit has seen: the groups were believed, as from a file."""
    listed = [Group(tuple(group)) for group in groups or [PAIR]]
    wrong = fusecli.fuse_modules(model, [list(group.modules) for group in listed])
    plain = copy.deepcopy(model)
    source = in_memory(plain, Spec())
    proof = prove_in_memory(plan_fold(source, source.structure(), listed), wrong, Trials((Sample.of(x),)))
    reports = (GroupReport(c.members, "", str(c.judgement), Evidence.CLAIMED) for c in proof.checks)
    return replace(proof.verdict, groups=tuple(reports))


def right_fold(model: nn.Module, *groups: list[str], x: Any = X) -> Any:
    """The fused copy of `model`, which had to be proven."""
    outcome = fused(model, *groups, x=x)
    assert outcome.status == "fused", verdict(outcome).reasons
    return outcome.model


def changed(model: nn.Module, name: str, change: Callable[[Tensor], Any]) -> Any:
    """A copy of `model` with one parameter or buffer changed in place by `change`."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        change(model.state_dict(keep_vars=True)[name])
    return model


def consistent(verdict: Verdict) -> bool:
    """The worst of the four checks is the judgement, and what is not proven has a reason."""
    found = set(verdict.check_results.values())
    worst = next(
        (j for j in (Judgement.DIFFERENT, Judgement.INCONCLUSIVE) if j in found), Judgement.EQUIVALENT
    )
    return verdict.judgement is worst and bool(verdict.reasons) is (worst is not Judgement.EQUIVALENT)
