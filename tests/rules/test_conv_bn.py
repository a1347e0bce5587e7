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


def refusal(net: nn.Module, x: torch.Tensor) -> Any:
    """The one refusal of [conv, bn]; the network has not changed."""
    before = {key: value.clone() for key, value in net.state_dict().items()}
    outcome = fuse(net, x, groups=["conv", "bn"])
    assert (outcome.exit_code, outcome.model) == (4, None)
    assert all(
        torch.equal(value, net.state_dict()[key]) for key, value in before.items() if not value.isnan().any()
    )
    (refused,) = outcome.refused
    return refused


@pytest.mark.parametrize("features", [5, 12])
def test_case_22_sizes_differ(features: int) -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(features))
    refused = refusal(net, nets.images(2, 3, 8, 8))
    assert refused.code == "shape"
    assert f"6 output channels, the affine map after it {features}" in refused.reason


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.InstanceNorm2d(6)], ids=repr)
def test_case_32_norms_that_depend_on_their_input(norm: nn.Module) -> None:
    assert (
        refusal(nets.chain(conv=nn.Conv2d(3, 6, 3), bn=norm), nets.images(2, 3, 8, 8)).code
        == "batch-dependent"
    )


def test_case_33_no_statistics() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6, track_running_stats=False))
    refused = refusal(net, nets.images(2, 3, 8, 8))
    assert refused.code == "no-statistics"
    assert "track_running_stats=False" in refused.reason


def test_a_norm_that_lacks_eps() -> None:
    net = nets.conv_bn()
    net.bn.eps = None
    refused = refusal(net, nets.images(2, 3, 8, 8))
    assert (refused.code, "eps" in refused.reason) == ("no-statistics", True)


@pytest.mark.parametrize("where", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_case_35_nan_or_inf_in_a_norm(where: str, value: float) -> None:
    net = nets.conv_bn()
    getattr(net.bn, where).data[4] = value
    refused = refusal(net, nets.images(2, 3, 8, 8))
    assert refused.code == "bad-statistics"
    assert f"{where} of channel 4 is {value}" in refused.reason


def test_case_35_negative_variance() -> None:
    net = nets.conv_bn()
    net.bn.running_var[2] = -0.25
    refused = refusal(net, nets.images(2, 3, 8, 8))
    assert (refused.code, "channel 2 is -0.25" in refused.reason) == ("bad-statistics", True)


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_case_35_nan_in_the_layer(where: str) -> None:
    net = nets.conv_bn()
    getattr(net.conv, where).data.view(-1)[1] = float("nan")
    assert refusal(net, nets.images(2, 3, 8, 8)).code == "not-finite"


def test_case_36_overflow_in_float16() -> None:
    net = nets.conv_bn().half()
    net.bn.running_var.fill_(1e-7)
    net.bn.weight.data.fill_(600.0)
    net.conv.weight.data.fill_(30.0)
    refused = refusal(net, nets.images(2, 3, 8, 8).half())
    assert (refused.code, refused.remedy) == ("overflow", "store this layer in float32")
    with pytest.raises(RefusedError, match="the largest float16"):
        fuse_modules(net, ["conv", "bn"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", GRID)
def test_like_torch_ao(torch_ao: Any, rank: int, bias: bool) -> None:
    net = nets.chain(conv=nets.CONV[rank](3, 8, 3, bias=bias), bn=nets.BATCH_NORM[rank](8))
    assert_like_torch_ao(torch_ao, net, nets.images(*GRID[rank]))
    assert kinds(fuse_modules(net, ["conv", "bn"])) == ["Sequential", f"Conv{rank}d", "Identity"]


@pytest.mark.parametrize("rank", GRID)
def test_hooks(rank: int) -> None:
    net = nets.chain(conv=nets.CONV[rank](3, 8, 3), bn=nets.BATCH_NORM[rank](8))
    assert_hooks_run_once(net, nets.images(*GRID[rank]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", GRID)
def test_case_20_norm_without_affine_parameters(rank: int, bias: bool) -> None:
    net = nets.chain(conv=nets.CONV[rank](3, 8, 3, bias=bias), bn=nets.BATCH_NORM[rank](8, affine=False))
    fused = assert_exact(net, nets.images(*GRID[rank]))
    assert list(fused.state_dict()) == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize(
    "attributes",
    [
        *({"padding": 1, "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")),
        {"padding": "same"},
        {"padding": "same", "dilation": 2},
        {"kernel_size": (2, 4), "padding": "same", "padding_mode": "reflect"},
        {"kernel_size": (4, 2), "padding": (2, 1)},
        {"stride": (2, 3), "padding": (0, 1)},
        {"dilation": (1, 2), "groups": 3},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_case_24_padding_kernels_dilation_and_stride(attributes: dict[str, Any]) -> None:
    conv = nn.Conv2d(3, 6, **{"kernel_size": 3, **attributes})
    net = nets.chain(conv=conv, bn=nets.BATCH_NORM[2](6))
    fused = assert_exact(net, nets.images(2, 3, 9, 8))
    settings = {k: v for k, v in vars(conv).items() if not k.startswith("_") and k != "training"}
    assert {k: v for k, v in vars(fused.conv).items() if k in settings} == settings
    assert "padding" in settings


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", GRID)
def test_grouped_and_depthwise(rank: int, groups: int) -> None:
    net = nets.chain(conv=nets.CONV[rank](4, 8, 3, groups=groups), bn=nets.BATCH_NORM[rank](8))
    assert_exact(net, nets.images(2, 4, *GRID[rank][2:]))


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize(
    "norm",
    [
        lambda eps: nn.SyncBatchNorm(6, eps=eps),
        lambda eps: nets.FrozenBatchNorm2d(6, eps),
        lambda eps: nn.InstanceNorm2d(6, eps=eps, affine=True, track_running_stats=True),
        lambda eps: nn.InstanceNorm2d(6, eps=eps, track_running_stats=True),
    ],
    ids=["sync", "frozen", "instance", "instance-plain"],
)
def test_case_30_relatives_of_batch_norm(norm: Any, eps: float) -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3, bias=False), bn=norm(eps))
    net.bn.running_var.mul_(0.01)  # small enough for eps to matter
    fused = assert_exact(net, nets.images(2, 3, 8, 8))
    assert kinds(fused) == ["Sequential", "Conv2d", "Identity"]
    assert fuse(net, nets.images(2, 3, 8, 8), groups=["conv", "bn"]).exit_code == 0


def test_case_34_extreme_statistics_are_exact() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)).double()
    net.bn.running_var[:4] = torch.tensor([0.0, 5e-324, 1e-310, 1e12], dtype=torch.float64)
    net.bn.weight.data[1:6] = torch.tensor([-3.0, 0.0, -1e-300, 0.0, 7.0], dtype=torch.float64)
    outcome = fuse(net, nets.images(2, 3, 8, 8, dtype=torch.float64), groups=["conv", "bn"])
    assert (outcome.exit_code, outcome.verification.float64_error < 1e-12) == (0, True)
    assert not outcome.model.conv.weight[4].any()
    assert torch.equal(outcome.model.conv.bias[4], net.bn.bias[4])


@pytest.mark.parametrize("norm_dtype", [torch.float32, None], ids=["float32-norm", "same-norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_case_37_the_dtype_is_the_layers(dtype: torch.dtype, norm_dtype: torch.dtype | None) -> None:
    net = nets.conv_bn(bias=False).to(dtype)
    net.bn.to(norm_dtype or dtype)
    fused = fuse_modules(net, ["conv", "bn"])
    assert {tensor.dtype for tensor in fused.state_dict().values()} == {dtype}
    exact = fuse_modules(nets.float64(net), ["conv", "bn"])
    for name in ("weight", "bias"):
        value = getattr(exact.conv, name)
        off = (getattr(fused.conv, name).double() - value).abs()
        assert bool(
            (off <= value.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal).all()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_case_37_mixed_dtypes_are_proven(dtype: torch.dtype) -> None:
    net = nets.conv_bn().to(dtype)
    net.bn.float()
    assert fuse(net, nets.images(2, 3, 8, 8, dtype=dtype), groups=["conv", "bn"]).exit_code == 0
