"""fuse(fuse(m)) == fuse(m), whatever a rule leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusecli import fuse, fuse_modules
from fusecli.errors import RefusedError
from tests import nets

X = nets.images(2, 3, 9, 8)
NETS: dict[str, Any] = {
    "pair": lambda: nets.conv_bn(),
    "container": lambda: nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), relu=nn.ReLU()),
    "conv and relu": lambda: nets.chain(conv=nn.Conv2d(3, 6, 3), relu=nn.ReLU()),
    "norm and relu": lambda: nets.chain(bn=nn.BatchNorm2d(3), relu=nn.ReLU()),
    "kept activation": lambda: nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), act=nn.SiLU()),
    "kept relu": lambda: nets.chain(conv=nn.ConvTranspose2d(3, 6, 3), bn=nn.BatchNorm2d(6), act=nn.ReLU()),
    "kept dropout": lambda: nets.chain(conv=nn.Conv2d(3, 6, 3), drop=nn.Dropout(), bn=nn.BatchNorm2d(6)),
    "remainder": lambda: nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nets.BatchNormAct2d(6, nn.PReLU())),
}


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return (
        [type(module) for module in a.modules()] == [type(module) for module in b.modules()]
        and list(left) == list(right)
        and all(torch.equal(left[key], right[key]) for key in left)
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_case_43_twice_is_once(name: str, inplace: bool) -> None:
    net = NETS[name]()
    group = [path for path, _ in net.named_children()]
    once = fuse_modules(net, group)
    assert not same(once, net)
    assert same(fuse_modules(once, group, inplace=inplace), once)


@pytest.mark.parametrize("name", NETS)
def test_case_43_fuse_says_there_is_nothing_to_do(name: str) -> None:
    net = NETS[name]()
    group = [path for path, _ in net.named_children()]
    once = fuse(net, X, groups=group)
    twice = fuse(once.model, X, groups=group)
    assert (once.exit_code, twice.exit_code, twice.status) == (0, 5, "nothing to fuse")
    assert same(twice.model, once.model)


def test_case_43_one_group_fused_and_one_new() -> None:
    net = nets.two_pairs()
    first = fuse_modules(net, ["conv1", "bn1", "relu1"])
    both = fuse_modules(first, [["conv1", "bn1", "relu1"], ["conv2", "bn2"]])
    assert same(both, fuse_modules(net, [["conv1", "bn1", "relu1"], ["conv2", "bn2"]]))


def test_a_new_norm_at_a_fused_place_is_not_fused_already() -> None:
    fused = fuse_modules(NETS["kept activation"](), ["conv", "bn", "act"])
    fused.bn = nets.randomise(nn.BatchNorm2d(6), 3)
    assert type(fuse_modules(fused, ["conv", "bn", "act"]).bn) is nn.Identity


def test_another_activation_behind_a_layer_is_still_refused() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), drop=nn.Identity(), act=nn.SiLU())
    with pytest.raises(RefusedError, match="no rule"):
        fuse_modules(net, ["conv", "drop", "act"])
