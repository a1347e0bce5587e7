"""`fusecli plan --graph`: the picture beside the spec."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cli.conftest import Project
from tests.cli.test_plan import FOUND, HOSTILE, LEFT, NAMES, PLAN, SMALL
from tests.conftest import Cli

DRAWN = Path("out.svg")
GRAPH = ("--graph", DRAWN)


def texts(look: str) -> list[str]:
    """What is written in this style: the names in the boxes, the codes, the legend."""
    root = ElementTree.fromstring(DRAWN.read_text(encoding="utf-8"))
    return [
        node.text or "" for node in root.iter() if node.get("class") == look and node.tag.endswith("text")
    ]


def test_beside_the_spec(cli: Cli, digits: Path) -> None:
    alone = cli(*PLAN)
    ended = cli(*PLAN, *GRAPH)
    assert (ended.code, ended.out) == (0, alone.out)
    first = DRAWN.read_text()
    assert texts("legend")[:2] == ["fused: 6 groups", "left: no norm"]
    assert texts("head") == ["model.pt"]
    assert {"input 0", "stem.conv", "blocks.1.bn", "head.classifier"} <= set(texts("name"))
    assert cli(*PLAN, "-o", FOUND, *GRAPH, "--force").code == 0
    assert FOUND.read_text() == alone.out
    assert DRAWN.read_text() == first


def test_where_nothing_folds(cli: Cli, project: Project) -> None:
    project(LEFT)
    assert cli(*SMALL, "--exclude", "conv", *GRAPH).code == 5
    assert texts("legend")[:2] == ["fused: 0 groups", "left: no-linear-producer × 2"]
    assert sorted(texts("code")) == [
        "batch-dependent",
        "excluded",
        "no-linear-producer",
        "no-linear-producer",
        "not-executed",
    ]


def test_around_some(cli: Cli, project: Project) -> None:
    project(LEFT)
    assert cli(*SMALL, *GRAPH, "--graph-around", "spare", "--graph-around", "conv").code == 0
    assert texts("name") == ["input 0", "conv", "bn", "relu", "spare (no part of this run)"]


def test_hostile_names(cli: Cli, project: Project) -> None:
    project(HOSTILE % NAMES)
    assert cli(*SMALL, *GRAPH).code == 0
    assert "a\\ngroups: [[x, y]].3" in texts("name")
    assert all(char.isprintable() or char == "\n" for char in DRAWN.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("words", "said", "fix"),
    [
        (["--graph-around", "stem.bn"], "--graph-around: there is no picture", "add --graph out.svg"),
        ([*GRAPH, "--graph-around", "stem.bm"], "no module is named 'stem.bm'", "did you mean 'stem.bn'?"),
        (["--graph", "none/out.svg"], "its folder does not exist", "create it first"),
        (["--graph", "."], "is a folder", "give a file name"),
        (["--graph", "taken.svg"], "taken.svg: exists already", "add --force"),
        (["--graph", "model.pt", "--force"], "is a file of the command itself", "another path"),
        (["--graph", "heldout.safetensors", "--force"], "is a file of the command itself", "another path"),
        (["--graph", "out.svg", "-o", "./out.svg"], "is a file of the command itself", "another path"),
        (["--graph", "a.md", "--report", "md=a.md"], "cannot replace a file of the command", "another path"),
    ],
)
def test_what_cannot_be_drawn(
    cli: Cli, digits: Path, words: Sequence[str | Path], said: str, fix: str
) -> None:
    Path("taken.svg").write_text("precious")
    before = {path.name: path.read_bytes() for path in digits.iterdir()}
    ended = cli(*PLAN, *words)
    assert (ended.code, ended.out) == (2, "")
    assert said in " ".join(ended.err.split())
    assert fix in " ".join(ended.err.split())
    assert {path.name: path.read_bytes() for path in digits.iterdir()} == before
