"""Modules that stand beside those that ran: of a list that forward picks from, the inputs ran one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusecli
from tests.cli.conftest import Project, project  # noqa: F401
from tests.conftest import Cli
from tests.proof.nets import X, bn, conv, net

INCONCLUSIVE = 6


def picked_norm() -> Any:
    """conv -> one of two norms: once that is folded, the other would normalise twice."""
    return net(lambda m, x: m.bns[0](m.conv(x)), conv=conv(), bns=nn.ModuleList([bn(), bn()]))


def picked_head() -> Any:
    """One of two heads behind a norm, whose gain goes into the one that ran."""
    heads = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})
    return net(lambda m, x: m.heads["a"](m.ln(x)), ln=nn.LayerNorm(8), heads=heads)


class Steps(nn.Sequential):
    """Indexed, and never called itself."""


def picked_step() -> Any:
    return net(lambda m, x: m.steps[1](m.conv(x)), conv=conv(), steps=Steps(bn(), bn(), nn.ReLU()))


CHOSEN: dict[str, tuple[Callable[[], Any], list[str], str]] = {
    "norms": (picked_norm, ["conv", "bns.0"], "bns.1"),
    "heads": (picked_head, ["ln", "heads.a"], "heads.b"),
    "steps": (picked_step, ["conv", "steps.1"], "steps.0, steps.2"),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_a_listed_group_is_inconclusive(case: str) -> None:
    make, group, beside = CHOSEN[case]
    outcome = fusecli.fuse(make(), X, groups=[group])
    assert (outcome.status, outcome.exit_code) == ("inconclusive", INCONCLUSIVE)
    assert outcome.verification is not None
    assert outcome.verification.smallest_tolerance is None
    assert any(beside in reason and "--assume-same-path" in reason for reason in outcome.verification.reasons)
    assert [entry.where for entry in outcome.ledger if entry.kind == "assumed"] == [beside]
    assert [report.status for report in outcome.groups] == ["inconclusive"]


@pytest.mark.parametrize("case", CHOSEN)
def test_an_offer_is_left(case: str) -> None:
    make, group, _ = CHOSEN[case]
    outcome = fusecli.fuse(make(), X, discover=True)
    assert outcome.status == "nothing to fuse"
    assert {norm.code for norm in outcome.unfused if norm.module in group} == {"other-path"}


@pytest.mark.parametrize("case", CHOSEN)
def test_unless_it_is_assumed(case: str) -> None:
    make, group, beside = CHOSEN[case]
    model = make()
    for how in ({"groups": [group]}, {"discover": True}):
        outcome = fusecli.fuse(model, X, assume_same_path=True, **how)  # type: ignore[arg-type]
        assert (outcome.status, [g.modules for g in outcome.groups]) == ("fused", [tuple(group)])
        assert [entry.where for entry in outcome.ledger if entry.kind == "assumed"] == [beside]
    assert str(fusecli.verify(model, outcome.model, X)) == "inconclusive"  # type: ignore[arg-type]
    assert fusecli.verify(model, outcome.model, X, assume_same_path=True).equivalent  # type: ignore[arg-type]
    assert fusecli.plan(model, X).groups == ()
    assert fusecli.plan(model, X, assume_same_path=True).groups == (tuple(group),)


def expert() -> nn.Module:
    return nn.Sequential(conv(), bn(), nn.ReLU())


def pair() -> Any:
    return nn.ModuleDict({"conv": conv(), "bn": bn()})


SAME: dict[str, tuple[Any, list[str]]] = {
    "within one expert": (
        net(lambda m, x: m.experts[1](x), experts=nn.ModuleList([expert(), expert()])),
        ["experts.1.0", "experts.1.1"],
    ),
    "a dict in a list": (
        net(lambda m, x: m.pairs[0]["bn"](m.pairs[0]["conv"](x)), pairs=nn.ModuleList([pair(), pair()])),
        ["pairs.0.conv", "pairs.0.bn"],
    ),
    "all of them ran": (
        net(
            lambda m, x: m.bns[1](m.b(m.bns[0](m.a(x)))), a=conv(), b=conv(), bns=nn.ModuleList([bn(), bn()])
        ),
        ["a", "bns.0"],
    ),
    "a Sequential that is called": (
        net(lambda m, x: m.body(x), body=nn.Sequential(conv(), bn())),
        ["body.0", "body.1"],
    ),
    "attributes are no choice": (
        net(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=bn(), spare=bn()),
        ["conv", "bn"],
    ),
    "another list": (
        net(
            lambda m, x: m.bn(m.conv(m.heads[0](x))),
            conv=conv(),
            bn=bn(),
            heads=nn.ModuleList([conv(), conv()]),
        ),
        ["conv", "bn"],
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_no_other_path_needs_it(case: str) -> None:
    model, group = SAME[case]
    outcome = fusecli.fuse(model, X, groups=[group])
    assert (outcome.status, [e for e in outcome.ledger if e.kind == "assumed"]) == ("fused", [])
    assert tuple(group) in [g.modules for g in fusecli.fuse(model, X, discover=True).groups]


SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln = nn.LayerNorm(8)
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

    def forward(self, x):
        return self.heads[WHICH](self.ln(x))

build = Net
"""
ALWAYS = SOURCE.replace("WHICH", "0")
DEPTH = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList([nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3)])

    def forward(self, x):
        for step in self.steps[:4 if x[0, 0, 0, 0] > 0 else 2]:
            x = step(x)
        return x

build = Net
"""
GROUP = (("ln", "heads.0"),)
SPEC = ("--spec", "fuse.yaml", "--allow-code", "net.py")
FUSE = ("fuse", "model.pt", *SPEC, "--report", "json=-")
SHAPE = ({"shape": [2, 8]},)


def where(ended: Any) -> list[str]:
    return [entry["where"] for entry in ended.report["ledger"] if entry["kind"] == "assumed"]


def test_on_files(cli: Cli, project: Project) -> None:  # noqa: F811
    project(ALWAYS, GROUP, SHAPE)
    ended = cli(*FUSE)
    assert (ended.code, where(ended), Path("model.fused.safetensors").exists()) == (
        INCONCLUSIVE,
        ["heads.1"],
        False,
    )
    ended = cli(*FUSE, "--assume-same-path")
    assert (ended.code, where(ended)) == (0, ["heads.1"])
    assert "--assume-same-path" in ended.report["next_step"]  # the next command would be inconclusive without
    verify = ("verify", "model.pt", "model.fused.safetensors", *SPEC, "--report", "json=-")
    ended = cli(*verify)
    assert (ended.code, where(ended)) == (INCONCLUSIVE, ["heads.1"])
    assert cli(*verify, "--assume-same-path").code == 0
    project(ALWAYS, GROUP, SHAPE, verify={"samples": 1, "assume_same_path": True})
    assert cli(*FUSE, "--force").code == 0


def test_the_plan_leaves_it_and_says_so(cli: Cli, project: Project) -> None:  # noqa: F811
    project(ALWAYS, None, SHAPE)
    words = ("plan", "model.pt", "--model", "net.py:Net", "--input", "2x8", "-o", "plan.yaml", "--force")
    assert cli(*words).code == 5
    assert "other-path: inputs that go to heads.1 may need it as it is" in Path("plan.yaml").read_text()
    ended = cli(*words, "--assume-same-path", "--report", "json=-")
    assert (ended.code, where(ended)) == (0, ["heads.1"])
    ended = cli("fuse", "model.pt", "--spec", "plan.yaml", "--allow-code", "net.py", "--report", "json=-")
    assert (ended.code, where(ended)) == (0, ["heads.1"])  # the plan holds what was assumed


def test_inputs_that_together_run_all(cli: Cli, project: Project) -> None:  # noqa: F811
    """Then each path has been compared end to end."""
    seed = next(n for n in range(99) if torch.randn(1, generator=torch.Generator().manual_seed(n)) < 0)
    group, shape = (("steps.0", "steps.1"),), ({"shape": [2, 3, 8, 8]},)
    project(DEPTH, group, shape, verify={"samples": 1, "seed": seed})
    assert cli(*FUSE).code == INCONCLUSIVE
    ended = cli(*FUSE, "--samples", "8")
    assert (ended.code, [place for place in where(ended) if "steps" in place]) == (0, [])
