from __future__ import annotations

import pytest
from torch import nn

from fusecli.rewrite import ModuleTree, stand_in_model
from tests import nets


def test_an_unknown_path() -> None:
    with pytest.raises(KeyError):
        ModuleTree(nets.conv_bn())["conv.0"]


def test_a_model_that_nobody_fused_has_no_groups() -> None:
    assert ModuleTree(nets.conv_bn()).rules_of_groups == {}


def test_every_alias_is_a_path() -> None:
    net = nets.conv_bn()
    net.twin = net.conv
    tree = ModuleTree(net)
    assert tree["twin"] is tree["conv"]
    assert tree[""] is net


def test_replacing_is_seen_by_the_model_and_by_later_look_ups() -> None:
    net = nn.Sequential(nets.conv_bn())
    tree, new = ModuleTree(net), nn.Identity()
    tree.replace("0.bn", new)
    assert tree["0.bn"] is net[0].bn is new


def test_replacing_one_alias_leaves_the_other() -> None:
    net = nets.conv_bn()
    net.twin = net.conv
    ModuleTree(net).replace("conv", nn.Identity())
    assert type(net.twin) is nn.Conv2d


def test_replacing_runs_no_code_of_the_class() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._modules["child"] = nn.ReLU()

        @property
        def child(self) -> nn.Module:
            return self._modules["child"]

        def __setattr__(self, name: str, value: object) -> None:
            assert name != "child", "__setattr__ ran"
            super().__setattr__(name, value)

    net = Guarded()
    ModuleTree(net).replace("child", nn.Identity())
    assert type(net.child) is nn.Identity


def test_plant_puts_each_module_at_its_path() -> None:
    modules = {"a.b.conv": nn.Conv2d(1, 1, 1), "a.b.bn": nn.BatchNorm2d(1), "top": nn.ReLU()}
    root = stand_in_model(modules)
    assert {path: root.get_submodule(path) for path in modules} == modules
    assert sorted(path for path, _ in root.named_modules()) == ["", "a", "a.b", "a.b.bn", "a.b.conv", "top"]
    assert not any(module.training for module in root.modules())
