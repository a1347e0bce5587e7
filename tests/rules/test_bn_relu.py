from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusecli import fuse, fuse_modules
from tests import nets
from tests.rules.side_by_side import assert_exact, assert_hooks_run_once, assert_like_torch_ao, kinds

GRID = {1: (2, 4, 5), 2: (2, 4, 5, 6), 3: (2, 4, 3, 4, 5)}


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(4, track_running_stats=True), nn.SyncBatchNorm(4), nets.FrozenBatchNorm2d(4)]
)
def test_no_container_takes_the_norm(norm: nn.Module) -> None:
    net = nets.chain(bn=norm, relu=nn.ReLU())
    (refused,) = fuse(net, nets.images(*GRID[2]), groups=["bn", "relu"]).refused
    assert (refused.code, type(norm).__name__ in refused.reason) == ("no-container", True)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rank", [2, 3])
def test_like_torch_ao(torch_ao: Any, rank: int, affine: bool) -> None:
    net = nets.chain(bn=nets.BATCH_NORM[rank](4, affine=affine), relu=nn.ReLU())
    assert_like_torch_ao(torch_ao, net, nets.images(*GRID[rank]))
    assert_hooks_run_once(net, nets.images(*GRID[rank]))


@pytest.mark.parametrize("shape", [GRID[1], (4, 4)], ids=str)
def test_case_21_bn1d_torch_ao_has_no_such_sequence(torch_ao: Any, shape: tuple[int, ...]) -> None:
    net = nets.chain(bn=nn.BatchNorm1d(4), relu=nn.ReLU())
    with pytest.raises(AssertionError, match="did not find fuser method"):
        torch_ao(net, ["bn", "relu"])
    fused = assert_exact(net, nets.images(*shape))
    assert kinds(fused) == ["Sequential", "BNReLU1d", "BatchNorm1d", "ReLU", "Identity"]
    assert torch.equal(fused(nets.images(*shape)), net(nets.images(*shape)))


def test_statistics_move_below_the_container() -> None:
    net = nets.chain(bn=nn.BatchNorm2d(4), relu=nn.ReLU())
    fused = fuse_modules(net, ["bn", "relu"])
    assert list(fused.state_dict()) == [key.replace("bn.", "bn.0.") for key in net.state_dict()]
