from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusecli import fuse, fuse_modules
from fusecli.errors import RefusedError
from tests import nets
from tests.rules.side_by_side import assert_exact, assert_hooks_run_once, assert_like_torch_ao, kinds

GRID = {1: (2, 3, 9), 2: (2, 3, 9, 8), 3: (2, 3, 5, 6, 7)}


def test_sizes_differ() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(5), relu=nn.ReLU())
    with pytest.raises(RefusedError, match="6 output channels"):
        fuse_modules(net, ["conv", "bn", "relu"])


@pytest.mark.parametrize(
    "activation",
    [nn.LeakyReLU(0.2), nn.SiLU(), nn.Hardswish(), nn.ReLU6(), nn.PReLU(6), nn.GELU(), nn.Sigmoid()],
    ids=repr,
)
def test_case_21_other_activations_stay(activation: nn.Module) -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), act=activation)
    fused = assert_exact(net, nets.images(2, 3, 9, 8))
    assert kinds(fused) == ["Sequential", "Conv2d", "Identity", type(activation).__name__]
    outcome = fuse(net, nets.images(2, 3, 9, 8), groups=["conv", "bn", "act"])
    (report,) = outcome.groups
    assert (outcome.exit_code, report.rule, report.kept) == (0, "conv_bn", ("act",))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", GRID)
def test_like_torch_ao(torch_ao: Any, rank: int, bias: bool) -> None:
    net = nets.chain(conv=nets.CONV[rank](3, 8, 3, bias=bias), bn=nets.BATCH_NORM[rank](8), relu=nn.ReLU())
    assert_like_torch_ao(torch_ao, net, nets.images(*GRID[rank]))
    fused = fuse_modules(net, ["conv", "bn", "relu"])
    assert list(fused.state_dict()) == ["conv.0.weight", "conv.0.bias"]
    assert type(fused.conv).__name__ == f"ConvReLU{rank}d"


@pytest.mark.parametrize("rank", GRID)
def test_hooks(rank: int) -> None:
    net = nets.chain(conv=nets.CONV[rank](3, 8, 3), bn=nets.BATCH_NORM[rank](8), relu=nn.ReLU())
    assert_hooks_run_once(net, nets.images(*GRID[rank]))


def test_the_relu_is_the_very_same_object_in_place_too() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), relu=nn.ReLU(inplace=True))
    relu = net.relu
    fuse_modules(net, ["conv", "bn", "relu"], inplace=True)
    assert net.conv[1] is relu


@pytest.mark.parametrize("affine", [True, False])
def test_case_20_without_affine_parameters(affine: bool) -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3, bias=False), bn=nn.BatchNorm2d(6, affine=affine), relu=nn.ReLU())
    assert torch.equal(assert_exact(net, nets.images(2, 3, 9, 8)).relu(torch.ones(1)), torch.ones(1))
