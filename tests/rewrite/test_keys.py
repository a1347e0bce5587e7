from __future__ import annotations

import pytest
from torch import nn

from fusecli import fuse_modules
from fusecli.engine import Group, plan
from fusecli.rewrite import Bias, Container, Identity, KeyMap, ModuleTree, Opaque, Remainder
from tests import nets

EDITS = (
    Bias("a.conv"),
    Identity("a.bn", "a.conv", last=False),
    Container("a.conv", "ConvReLU2d", ("a.conv", "a.relu")),
    Identity("b.bn", "b.conv"),
    Remainder("c.bn", "c.conv", ("drop", "act")),
    Opaque("d.conv", ("d.conv", "d.act"), "pkg:fuser"),
)


@pytest.mark.parametrize(
    "key",
    [
        "head.weight",
        "a.conv2.weight",
        "a.convolution.weight",
        "b.conv.weight",
        "weight",
        "a.weight",
        "ab.bn.x",
    ],
)
def test_other_keys_stay(key: str) -> None:
    assert KeyMap(EDITS)(key) == key


def test_no_edits() -> None:
    assert KeyMap(())("a.conv.weight") == "a.conv.weight"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a.conv.weight", "a.conv.0.weight"),
        ("a.conv.parametrizations.weight.original", "a.conv.0.parametrizations.weight.original"),
        ("a.relu.slope", "a.conv.1.slope"),
        ("a.bn.weight", None),
        ("b.bn.running_mean", None),
        ("c.bn.weight", None),
        ("c.bn.act.weight", "c.bn.act.weight"),
        ("c.bn.other.weight", None),
        ("d.conv.0.weight", "d.conv.0.weight"),
        ("d.act.weight", None),
    ],
)
def test_keys_follow_their_modules(old: str, new: str | None) -> None:
    assert KeyMap(EDITS)(old) == new


@pytest.mark.parametrize("act", [nn.ReLU(), nn.PReLU()], ids=repr)
def test_the_map_says_what_the_edits_do(act: nn.Module) -> None:
    net = nets.chain(
        conv=nn.Conv2d(3, 6, 3),
        bn=nn.BatchNorm2d(6),
        act=act,
        conv2=nn.Conv2d(6, 6, 3),
        norm=nets.BatchNormAct2d(6, nn.PReLU()),
    )
    groups = [("conv", "bn", "act"), ("conv2", "norm")]
    decisions = plan(ModuleTree(net), map(Group, groups)).decisions
    rewrites = [d.rewrite({path: net.get_submodule(path) for path in d.members}) for d in decisions]
    keymap = KeyMap(edit for rewrite in rewrites for edit in rewrite.edits)
    mapped = [new for key in net.state_dict() if (new := keymap(key)) is not None]
    assert mapped == list(fuse_modules(net, groups).state_dict())
