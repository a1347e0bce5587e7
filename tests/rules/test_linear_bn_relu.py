from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fusecli import fuse_modules
from fusecli.errors import RefusedError
from tests import nets
from tests.rules.side_by_side import assert_exact, assert_hooks_run_once, kinds


def test_no_statistics() -> None:
    net = nets.chain(linear=nn.Linear(5, 7), bn=nn.BatchNorm1d(7, track_running_stats=False), relu=nn.ReLU())
    with pytest.raises(RefusedError, match="track_running_stats=False"):
        fuse_modules(net, ["linear", "bn", "relu"])


def test_torch_ao_has_no_such_sequence(torch_ao: Any) -> None:
    net = nets.chain(linear=nn.Linear(5, 7), bn=nn.BatchNorm1d(7), relu=nn.ReLU())
    with pytest.raises(AssertionError, match="did not find fuser method"):
        torch_ao(net, ["linear", "bn", "relu"])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_case_21_exact(bias: bool, affine: bool) -> None:
    net = nets.chain(linear=nn.Linear(5, 7, bias), bn=nn.BatchNorm1d(7, affine=affine), relu=nn.ReLU())
    fused = assert_exact(net, nets.images(4, 5))
    assert kinds(fused) == ["Sequential", "LinearReLU", "Linear", "ReLU", "Identity", "Identity"]
    assert list(fused.state_dict()) == ["linear.0.weight", "linear.0.bias"]


def test_hooks() -> None:
    net = nets.chain(linear=nn.Linear(5, 7), bn=nn.BatchNorm1d(7), relu=nn.ReLU())
    assert_hooks_run_once(net, nets.images(4, 5))
