from __future__ import annotations

import pytest
from torch import nn

from fusecli import fuse_modules_qat
from fusecli.errors import RefusedError
from tests import nets
from tests.rules.side_by_side import names
from tests.rules.training import assert_hooks_run_once_qat, assert_like_torch_ao_qat

GRID = {1: (4, 3, 9), 2: (4, 3, 9, 8), 3: (4, 3, 5, 6, 7)}


def net(rank: int = 2, bias: bool = True):
    return nets.chain(
        conv=nets.CONV[rank](3, 8, 3, bias=bias, padding=1),
        bn=nets.BATCH_NORM[rank](8, eps=1e-3),
        relu=nn.ReLU(),
    ).train()


def test_a_norm_without_gamma_is_refused_here_too() -> None:
    model = net()
    model.bn = nn.BatchNorm2d(8, affine=False)
    with pytest.raises(RefusedError, match="no gamma and beta to learn"):
        fuse_modules_qat(model, names(model))


def test_another_activation_stays_where_it_is() -> None:
    model = nets.chain(conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), act=nn.ReLU6()).train()
    fused = fuse_modules_qat(model, names(model))
    assert [type(child).__name__ for child in fused.children()] == ["ConvBn2d", "Identity", "ReLU6"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", GRID)
def test_case_45_like_torch_ao(rank: int, bias: bool) -> None:
    assert_like_torch_ao_qat(net(rank, bias), nets.images(*GRID[rank]))
    assert_hooks_run_once_qat(net(rank, bias), nets.images(*GRID[rank]))
