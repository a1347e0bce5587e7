from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fusecli import fuse, fuse_modules
from fusecli.errors import RefusedError
from tests import nets
from tests.rules.side_by_side import assert_hooks_run_once, assert_like_torch_ao

GRID = {1: (2, 3, 9), 2: (2, 3, 9, 8), 3: (2, 3, 5, 6, 7)}


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.LeakyReLU(), nn.PReLU()], ids=repr)
def test_no_container_takes_another_activation(activation: nn.Module) -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), act=activation)
    with pytest.raises(RefusedError, match=f"no rule fuses Conv2d -> {type(activation).__name__}"):
        fuse_modules(net, ["conv", "act"])


def test_no_container_takes_a_transposed_convolution() -> None:
    net = nets.chain(conv=nn.ConvTranspose2d(3, 6, 3), relu=nn.ReLU())
    with pytest.raises(RefusedError, match="no rule fuses ConvTranspose2d -> ReLU"):
        fuse_modules(net, ["conv", "relu"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", GRID)
def test_like_torch_ao(torch_ao: Any, rank: int, bias: bool) -> None:
    net = nets.chain(conv=nets.CONV[rank](3, 8, 3, bias=bias), relu=nn.ReLU())
    assert_like_torch_ao(torch_ao, net, nets.images(*GRID[rank]))
    assert_hooks_run_once(net, nets.images(*GRID[rank]))


def test_nothing_is_computed() -> None:
    net = nets.chain(conv=nets.SamePadConv2d(3, 6, 3), relu=nn.ReLU())
    weight, bias = net.conv.weight, net.conv.bias
    fuse_modules(net, ["conv", "relu"], inplace=True)
    assert (net.conv[0].weight is weight, net.conv[0].bias is bias) == (True, True)


def test_a_parametrized_weight_moves_as_it_is() -> None:
    net = nets.chain(conv=parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), relu=nn.ReLU())
    x = nets.images(2, 3, 9, 8)
    outcome = fuse(net, x, groups=["conv", "relu"])
    assert outcome.exit_code == 0
    assert torch.equal(outcome.model(x), net(x))
