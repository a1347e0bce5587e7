from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fusecli import fuse, fuse_modules
from fusecli.errors import RefusedError
from tests import nets
from tests.rules.side_by_side import assert_exact, assert_hooks_run_once, assert_like_torch_ao, kinds

GRID = {1: (2, 4, 5), 2: (2, 4, 5, 6), 3: (2, 4, 3, 4, 5)}
GROUPS: dict[str, dict[str, int]] = {
    "dense": {"out_channels": 8},
    "2 groups": {"out_channels": 8, "groups": 2},
    "4 groups": {"in_channels": 8, "out_channels": 12, "groups": 4},
    "depthwise": {"out_channels": 4, "groups": 4},
    "depthwise with multiplier": {"out_channels": 12, "groups": 4},
    "as many outputs as inputs": {"out_channels": 4, "groups": 2},
}
GEOMETRY: dict[str, dict[str, int]] = {
    "plain": {},
    "output padding": {"stride": 2, "padding": 1, "output_padding": 1},
    "dilation": {"dilation": 2},
}


def layer(rank: int, **attributes: Any) -> Any:
    return nets.CONV_TRANSPOSE[rank](**{"in_channels": 4, "kernel_size": 3, **attributes})


def test_sizes_differ() -> None:
    # A weight [4, 8, k, k] with a norm of 4: scaling axis 0 of the storage would go unnoticed.
    net = nets.chain(conv=layer(2, out_channels=8), bn=nn.BatchNorm2d(4))
    with pytest.raises(RefusedError, match="8 output channels, the affine map after it 4"):
        fuse_modules(net, ["conv", "bn"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", GRID)
def test_like_torch_ao(torch_ao: Any, rank: int, bias: bool) -> None:
    net = nets.chain(conv=layer(rank, out_channels=8, bias=bias), bn=nets.BATCH_NORM[rank](8))
    assert_like_torch_ao(torch_ao, net, nets.images(*GRID[rank]))
    assert_hooks_run_once(net, nets.images(*GRID[rank]))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("rank", GRID)
def test_case_18_grouped(rank: int, groups: str, geometry: str, affine: bool) -> None:
    conv = layer(rank, **GROUPS[groups], **GEOMETRY[geometry])
    net = nets.chain(conv=conv, bn=nets.BATCH_NORM[rank](conv.out_channels, affine=affine))
    fused = assert_exact(net, nets.images(2, conv.in_channels, *GRID[rank][2:]))
    assert fused.conv.weight.shape == conv.weight.shape
    assert fused.conv.bias.shape == (conv.out_channels,)


def test_case_18_torch_ao_cannot(torch_ao: Any) -> None:
    """What the grouped cases are worth: torch raises, or gives a weight of another shape."""
    grouped = nets.chain(conv=layer(2, **GROUPS["2 groups"]), bn=nn.BatchNorm2d(8))
    with pytest.raises(RuntimeError, match="must match"):
        torch_ao(grouped, ["conv", "bn"])
    depthwise = nets.chain(conv=layer(2, **GROUPS["depthwise"]), bn=nn.BatchNorm2d(4))
    assert torch_ao(depthwise, ["conv", "bn"]).conv.weight.shape != depthwise.conv.weight.shape


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(), nn.Tanh()], ids=repr)
@pytest.mark.parametrize("rank", GRID)
def test_case_21_the_activation_stays(rank: int, activation: nn.Module) -> None:
    net = nets.chain(conv=layer(rank, out_channels=8), bn=nets.BATCH_NORM[rank](8), act=activation)
    fused = assert_exact(net, nets.images(*GRID[rank]))
    assert kinds(fused)[2:] == ["Identity", type(activation).__name__]
    (report,) = fuse(net, nets.images(*GRID[rank]), groups=["conv", "bn", "act"]).groups
    assert (report.status, report.rule, report.kept) == ("equivalent", "conv_transpose_bn", ("act",))
