from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fusecli import fuse_modules
from fusecli.errors import RefusedError
from tests import nets
from tests.rules.side_by_side import assert_hooks_run_once, assert_like_torch_ao


def test_no_container_takes_another_activation() -> None:
    net = nets.chain(linear=nn.Linear(5, 7), act=nn.GELU())
    with pytest.raises(RefusedError, match="no rule fuses Linear -> GELU"):
        fuse_modules(net, ["linear", "act"])


@pytest.mark.parametrize("bias", [True, False])
def test_like_torch_ao(torch_ao: Any, bias: bool) -> None:
    net = nets.chain(linear=nn.Linear(5, 7, bias), relu=nn.ReLU())
    assert_like_torch_ao(torch_ao, net, nets.images(4, 5))
    assert_hooks_run_once(net, nets.images(4, 5))
