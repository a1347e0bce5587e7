from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusecli import fuse, fuse_modules
from fusecli.errors import RefusedError
from fusecli.outcome import Judgement
from tests import nets
from tests.proof.nets import judged
from tests.rules.side_by_side import assert_exact, assert_hooks_run_once, assert_like_torch_ao, kinds


def linear_bn(bias: bool = True, **norm: Any) -> Any:
    return nets.chain(linear=nn.Linear(5, 7, bias), bn=nn.BatchNorm1d(7, **norm))


def test_sizes_differ() -> None:
    net = nets.chain(linear=nn.Linear(5, 7), bn=nn.BatchNorm1d(5))
    with pytest.raises(RefusedError, match="7 output channels, the affine map after it 5"):
        fuse_modules(net, ["linear", "bn"])


def test_layer_norm_is_refused() -> None:
    net = nets.chain(linear=nn.Linear(5, 7), bn=nn.LayerNorm(7))
    (refused,) = fuse(net, nets.images(4, 5), groups=["linear", "bn"]).refused
    assert refused.code == "batch-dependent"


def test_channels_on_another_axis_never_pass() -> None:
    # [n, l, c] with l == c: BatchNorm1d normalises axis 1, the fold axis 2.
    net = nets.chain(linear=nn.Linear(5, 7), bn=nn.BatchNorm1d(7))
    x = nets.images(4, 7, 5)
    outcome = fuse(net, x, groups=["linear", "bn"])
    assert (outcome.exit_code, [no.code for no in outcome.refused]) == (4, ["bn-axis"])
    assert judged(net, ["linear", "bn"], x=x).judgement is Judgement.DIFFERENT


@pytest.mark.parametrize("bias", [True, False])
def test_like_torch_ao(torch_ao: Any, bias: bool) -> None:
    assert_like_torch_ao(torch_ao, linear_bn(bias), nets.images(64, 5))
    assert_hooks_run_once(linear_bn(bias), nets.images(4, 5))


@pytest.mark.parametrize("bias", [True, False])
def test_case_20_norm_without_affine_parameters(torch_ao: Any, bias: bool) -> None:
    net = linear_bn(bias, affine=False)
    fused = assert_exact(net, nets.images(4, 5))
    assert list(fused.state_dict()) == ["linear.weight", "linear.bias"]
    with pytest.raises(TypeError):
        torch_ao(net, ["linear", "bn"])


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.PReLU(7)], ids=repr)
def test_case_21_the_activation_stays(activation: nn.Module) -> None:
    net = nets.chain(linear=nn.Linear(5, 7), bn=nn.BatchNorm1d(7), act=activation)
    assert kinds(assert_exact(net, nets.images(4, 5)))[2:] == ["Identity", type(activation).__name__]
    (report,) = fuse(net, nets.images(4, 5), groups=["linear", "bn", "act"]).groups
    assert (report.status, report.rule, report.kept) == ("equivalent", "linear_bn", ("act",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_case_37_the_dtype_is_the_layers(dtype: torch.dtype) -> None:
    net = linear_bn().to(dtype)
    net.bn.float()
    fused = fuse_modules(net, ["linear", "bn"])
    assert {tensor.dtype for tensor in fused.state_dict().values()} == {dtype}
