"""What is drawn around the norms of a model, and what is said to lie beyond."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusecli.commands.picture import check_around, picture_of
from fusecli.engine import discover
from fusecli.errors import UsageError
from fusecli.picture import Fate, Node, Picture, Role
from fusecli.pipeline.select import Selection
from fusecli.rewrite import ModuleTree
from fusecli.source.resolve import in_memory
from fusecli.spec import Spec
from tests import nets
from tests.graph.conftest import run_of

X = nets.images(2, 3, 6, 6)


def drawn(model: nn.Module, *around: str, inputs: Any = (X,)) -> Picture:
    model.eval()
    run = run_of(model, *inputs)
    offer = discover(ModuleTree(model), run)
    source = in_memory(model, Spec())
    selection = Selection(source, source.structure(), run, offer=offer, taking=True)
    decisions = offer.plan.decisions
    return picture_of("model", selection, decisions, selection.unfused(decisions), around)


@dataclass
class Drawn:
    """A picture by the names of its nodes; `fc#2` is the second call of fc."""

    nodes: dict[str, Node]
    edges: set[str]


def named(picture: Picture) -> Drawn:
    names: list[str] = []
    for node in picture.nodes:
        count = sum(name.partition("#")[0] == node.name for name in names)
        names.append(f"{node.name}#{count + 1}" if count else node.name)
    edges = {f"{names[a]} > {names[b]}" for a, b in picture.edges}
    return Drawn(dict(zip(names, picture.nodes, strict=True)), edges)


class Shared(nn.Module):
    """A convolution that two read; the norm of another stands behind a ReLU; a norm that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.mix, self.good = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act, self.late = nn.ReLU(), nn.BatchNorm2d(4)
        self.spare = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.good(self.mix(self.bn(y) + y.sigmoid()))
        return self.late(self.act(z))


def test_who_else_reads_it_and_what_stands_between() -> None:
    found = named(drawn(Shared()))
    assert {"conv > bn", "conv > sigmoid", "act > late", "mix > good", "input 0 > conv"} <= found.edges
    fates = {name: (node.fate, node.note) for name, node in found.nodes.items() if node.note}
    assert fates == {
        "bn": (Fate.LEFT, "multiple-consumers"),
        "mix": (Fate.FUSED, "conv_bn"),
        "good": (Fate.FUSED, "conv_bn"),
        "late": (Fate.LEFT, "no-linear-producer"),
        "spare": (Fate.LEFT, "not-executed"),
    }
    assert found.nodes["mix"].group == found.nodes["good"].group == 0
    assert "aten.relu" in found.nodes["late"].reason
    assert (found.nodes["spare"].call, found.nodes["spare"].kind) == ("no part of this run", "BatchNorm2d")
    assert found.nodes["conv"].shape == (2, 4, 4, 4)
    assert {found.nodes[end].role for end in ("input 0", "the model's output")} == {Role.END}


def test_around_a_module() -> None:
    found = named(drawn(Shared(), "late"))
    assert set(found.nodes) == {"late", "act", "good", "the model's output"}
    assert (found.nodes["good"].above, found.nodes["good"].below) == (("mix",), ())
    # What is not a norm can be asked for too; two neighbourhoods that meet are one.
    assert set(named(drawn(Shared(), "conv")).nodes) == {"input 0", "conv", "bn", "sigmoid", "add"}
    assert set(named(drawn(Shared(), "late", "spare")).nodes) == {*found.nodes, "spare"}
    both = {*found.nodes, "input 0", "conv", "bn", "sigmoid", "add"}
    assert set(named(drawn(Shared(), "late", "conv")).nodes) == both


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x).transpose(1, 2).view(2, 6, 3, 6))
        for _ in range(4):
            x = self.fc(x)
        return x


def test_every_call_and_moves_that_are_no_hop() -> None:
    found = named(drawn(Calls()))
    assert {"first > transpose", "norm > fc", "fc > fc#2"} <= found.edges
    assert [found.nodes[name].call for name in ("fc", "fc#2")] == ["call 1 of 4", "call 2 of 4"]
    assert found.nodes["fc#2"].below == ("fc",)
    assert "fc#3" not in found.nodes
    assert found.nodes["transpose"].role is Role.MOVE
    assert "input 0" in found.nodes  # two hops up, moves not counted


class Joined(nn.Module):
    """Two convolutions side by side in a container, and a function that normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.a, self.block.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.block.a(x), self.block.b(x)], 1)
        return F.group_norm(self.bn(both), 2)


def test_ops_and_containers() -> None:
    found = named(drawn(Joined()))
    assert {"block.a > cat", "block.b > cat", "cat > bn"} <= found.edges
    assert found.nodes["native_group_norm"].note == "batch-dependent"
    around = named(drawn(Joined(), "block")).nodes
    assert {"block.a", "block.b", "input 0", "cat"} <= set(around)


class Tied(nn.Module):
    """One norm under two names, called under the second."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.conv, self.again = nn.Conv2d(3, 4, 1), self.bn

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.conv(x))


def test_a_second_name_is_the_same_module() -> None:
    assert named(drawn(Tied(), "again")).edges == named(drawn(Tied(), "bn")).edges
    assert set(named(drawn(Tied())).nodes) == {"input 0", "conv", "bn", "the model's output"}


class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.bn(self.conv.weight.flatten(1).t()).t().view(4, 3, 3, 3)
        return F.conv2d(x, weight, self.conv.bias)


def test_a_norm_that_works_on_weights_is_drawn() -> None:
    node = named(drawn(WeightNormed())).nodes["bn"]
    assert (node.fate, node.note, node.call) == (Fate.LEFT, "norm-on-weights", "")


def test_nothing_to_draw_around() -> None:
    assert drawn(nets.chain(conv=nn.Conv2d(3, 4, 3))).nodes == ()


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError) as caught:
        check_around(["stem.bn", "stem.bm", "x"], ["stem", "stem.conv", "stem.bn"])
    assert [str(problem) for problem in caught.value.problems] == [
        "--graph-around: no module is named 'stem.bm'; did you mean 'stem.bn'?",
        "--graph-around: no module is named 'x'; give the name of a module",
    ]
