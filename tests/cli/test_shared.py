"""Modules and weights with several names: refused, or with `shared: clone` a copy for each that is folded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusecli
from tests.cli.conftest import Project
from tests.conftest import Cli, Run
from tests.nets import images

WORDS = ("--spec", "fuse.yaml", "--allow-code", "net.py")
FUSE = ("fuse", "model.pt", *WORDS, "--report", "json=-")
VERIFY = ("verify", "model.pt", "model.fused.safetensors")
FUSED = Path("model.fused.safetensors")
HEADER = """
import torch
from torch import nn

def conv():
    return nn.Conv2d(3, 3, 3, padding=1)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv(), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        {setup}
        self.head, self.tail = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.tail.weight = self.head.weight
        self.last = self.again = nn.Linear(6, 6)

    def forward(self, x):
        x = {result}
        return self.again(self.tail(torch.relu(self.head(self.last(x)))))

build = Net
"""


def net(setup: str, result: str) -> str:
    return HEADER.format(setup=setup, result=result)


NORM = "self.n = nn.BatchNorm2d(3); "
NORMS = "self.n1, self.n2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3); "
CHAINED = "self.n2(self.b(torch.relu(self.n1(self.a(x)))))"
# source, groups, the code without clone, where ties are broken
SHARED: dict[str, tuple[str, list[list[str]], str, list[str]]] = {
    "alias": (
        net(f"{NORMS}self.a = conv(); self.b = self.a", CHAINED),
        [["a", "n1"], ["b", "n2"]],
        "shared-module",
        ["a", "b"],
    ),
    "tied parameters": (
        net(f"{NORMS}self.a, self.b = conv(), conv(); self.b.weight = self.a.weight", CHAINED),
        [["a", "n1"], ["b", "n2"]],
        "tied-weights",
        ["a", "b"],
    ),
    "tied biases": (
        net(f"{NORMS}self.a, self.b = conv(), conv(); self.b.bias = self.a.bias", CHAINED),
        [["a", "n1"], ["b", "n2"]],
        "tied-weights",
        ["a", "b"],
    ),
    "a block under two names": (
        net("self.a = Block(); self.b = self.a", "self.b(self.a(x))"),
        [["a.conv", "a.bn"], ["b.conv", "b.bn"]],
        "shared-module",
        ["a", "b"],
    ),
    "one block three times": (
        net("self.body = nn.Sequential(*[Block()] * 3)", "self.body(x)"),
        [["body.*.conv", "body.*.bn"]],
        "shared-module",
        ["body.0", "body.1", "body.2"],
    ),
    "another norm behind one name": (
        net(f"{NORM}self.a = Block(); self.b = self.a", "self.n(self.b.conv(self.a(x)))"),
        [["a.conv", "a.bn"], ["b.conv", "n"]],
        "shared-module",
        ["a", "b"],
    ),
    "one of two is folded": (
        net(f"{NORM}self.a = conv(); self.b = self.a", "self.b(torch.relu(self.n(self.a(x))))"),
        [["a", "n"]],
        "shared-module",
        ["a"],
    ),
}
INPUTS = [{"shape": [2, 3, 6, 6]}]


def ties(ended: Run) -> list[str]:
    return [entry["where"] for entry in ended.report["ledger"] if "copy of its own" in entry["what"]]


def loaded(source: str) -> tuple[Any, Any]:
    """The model as its authors load it, and the fused one."""
    names: dict[str, Any] = {"__name__": "net"}
    exec(source, names)
    original = names["build"]()
    original.load_state_dict(torch.load("model.pt", weights_only=True))
    return original.eval(), fusecli.load_fused(names["build"](), FUSED)


@pytest.fixture(params=SHARED)
def case(request: pytest.FixtureRequest) -> tuple[str, list[list[str]], str, list[str]]:
    return SHARED[request.param]


def test_refused_by_default(cli: Cli, project: Project, case: Any) -> None:
    source, groups, code, _ = case
    project(source, groups, INPUTS)
    ended = cli(*FUSE)
    assert ended.code == 4
    assert {no["code"] for no in ended.report["refused"]} == {code}
    assert all("`shared: clone`" in no["remedy"] for no in ended.report["refused"])
    assert "shared: clone" in " ".join(cli(*FUSE[:-2]).out.split())
    assert not FUSED.exists()


@pytest.mark.parametrize("discovered", [False, True])
def test_clone(cli: Cli, project: Project, case: Any, discovered: bool) -> None:
    source, groups, _, broken = case
    project(source, *((None if discovered else groups), INPUTS), shared="clone", discover=discovered)
    ended = cli(*FUSE)
    assert (ended.code, ended.report["status"]) == (0, "fused"), ended.err
    assert all(group["evidence"] == "observed" for group in ended.report["groups"])
    assert ties(ended) == broken
    original, fused = loaded(source)
    for path in [path for group in ended.report["groups"] for path in group["modules"][1:]]:
        assert isinstance(fused.get_submodule(path), nn.Identity)
    # No other tie is broken.
    assert fused.tail.weight is fused.head.weight
    assert fused.last is fused.again
    assert fused.last.weight.data_ptr() == fused.again.weight.data_ptr()
    # The model's own ties stay as they were.
    assert original.tail.weight is original.head.weight
    with torch.no_grad():
        assert torch.allclose(fused(images(2, 3, 6, 6)), original(images(2, 3, 6, 6)), rtol=1e-3, atol=1e-2)
    ended = cli(*VERIFY, *WORDS, "--report", "json=-")
    assert (ended.code, ended.report["status"]) == (0, "verified"), ended.out


def test_clone_is_verified_from_the_files_alone(cli: Cli, project: Project, case: Any) -> None:
    source, groups, _, _ = case
    project(source, groups, INPUTS, shared="clone")
    assert cli(*FUSE).code == 0
    ended = cli(*VERIFY, "--report", "json=-")
    assert (ended.code, ended.report["status"]) == (0, "verified"), ended.out


def test_clone_is_verified_in_memory(cli: Cli, project: Project, case: Any) -> None:
    source, groups, _, _ = case
    project(source, groups, INPUTS, shared="clone")
    assert cli(*FUSE).code == 0
    assert fusecli.verify(*loaded(source), images(2, 3, 6, 6)).equivalent


def test_the_file_holds_each_copy(cli: Cli, project: Project) -> None:
    source, groups, _, _ = SHARED["alias"]
    project(source, groups, INPUTS, shared="clone")
    assert cli(*FUSE).code == 0
    _, fused = loaded(source)
    assert fused.a is not fused.b
    assert not torch.equal(fused.a.weight, fused.b.weight)


def test_clone_changes_nothing_where_nothing_is_shared(cli: Cli, project: Project) -> None:
    project()
    assert cli(*FUSE, "-o", "refuse.safetensors").code == 0
    project(shared="clone")
    ended = cli(*FUSE, "-o", "clone.safetensors")
    assert (ended.code, ties(ended)) == (0, [])
    assert Path("refuse.safetensors").read_bytes() == Path("clone.safetensors").read_bytes()


def test_the_same_bytes_each_time_and_with_discovery(cli: Cli, project: Project) -> None:
    source, groups, _, _ = SHARED["a block under two names"]
    project(source, groups, INPUTS, shared="clone")
    for name in ("a", "b"):
        assert cli(*FUSE, "-o", f"{name}.safetensors").code == 0
    project(source, None, INPUTS, shared="clone", discover=True)
    assert cli(*FUSE, "-o", "c.safetensors").code == 0
    assert len({Path(f"{name}.safetensors").read_bytes() for name in "abc"}) == 1


def test_a_name_that_may_not_be_folded_stays_tied(cli: Cli, project: Project) -> None:
    """Of three names two are folded; the third reads the weight as it was."""
    source = net(
        f"{NORMS}self.a = conv(); self.b = self.a; self.c = self.a; self.e = self.a",
        "self.e(self.c(torch.relu(" + CHAINED + ")))",
    )
    project(source, None, INPUTS, shared="clone", discover=True)
    ended = cli(*FUSE)
    assert (ended.code, ties(ended)) == (0, ["a", "b"])
    original, fused = loaded(source)
    assert fused.c is fused.e
    assert torch.equal(fused.c.weight, original.c.weight)


def test_an_unknown_way_to_share(cli: Cli, project: Project) -> None:
    project(shared="copy")
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "shared 'copy' is unknown" in ended.err
    assert "refuse, clone" in ended.err


JOINED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.other = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.a(x)) * self.bn(self.b(x))

build = Net
"""
BOTH = [["a", "bn"], ["b", "bn"]]


class TestOneNormBehindTwoLayers:
    @pytest.mark.parametrize("keys", [{"groups": BOTH}, {"discover": True}])
    def test_both_are_folded(self, cli: Cli, project: Project, keys: dict[str, Any]) -> None:
        project(**{"source": JOINED, "groups": None, "inputs": INPUTS, **keys})
        ended = cli(*FUSE)
        assert (ended.code, [group["modules"] for group in ended.report["groups"]]) == (0, BOTH)
        assert ended.report["totals"]["before"]["norms"] - ended.report["totals"]["after"]["norms"] == 1
        original, fused = loaded(JOINED)
        assert isinstance(fused.bn, nn.Identity)
        assert fusecli.verify(original, fused, images(2, 3, 8, 8)).equivalent
        for words in (WORDS, ()):
            assert cli(*VERIFY, *words).code == 0

    @pytest.mark.parametrize("group", BOTH, ids=" ".join)
    def test_one_alone_is_refused(self, cli: Cli, project: Project, group: list[str]) -> None:
        project(JOINED, [group], INPUTS)
        ended = cli(*FUSE)
        (no,) = ended.report["refused"]
        assert (ended.code, no["group"], no["code"]) == (4, group, "shared-module")
        other = {"a": "b", "b": "a"}[group[0]]
        assert any(other in seen.split() for seen in no["evidence"]), no["evidence"]
        assert not FUSED.exists()

    def test_plan_lists_both(self, cli: Cli, project: Project) -> None:
        project(JOINED, None, INPUTS)
        ended = cli("plan", "model.pt", *WORDS)
        assert "  - [a, bn]\n  - [b, bn]\n# Left" in ended.out
        Path("fuse.yaml").write_text(ended.out)
        assert cli(*FUSE).code == 0

    @pytest.mark.parametrize(
        ("groups", "said"),
        [
            ([["a", "bn"], ["a", "bn"]], "listed already"),
            ([["a", "bn"], ["a", "other"]], "'a' is in another group already"),
            ([["a", "bn", "other"], ["b", "bn"]], "'bn' is in another group already"),
            ([["a", "bn"], ["bn", "other"]], "'bn' is in another group already"),
        ],
    )
    def test_other_overlaps_are_slips(
        self, cli: Cli, project: Project, groups: list[list[str]], said: str
    ) -> None:
        project(JOINED, groups, INPUTS)
        ended = cli(*FUSE)
        assert (ended.code, json.loads(ended.out)["status"]) == (2, "error")
        assert said in ended.err
        assert "fuse.yaml:1:" in ended.err
