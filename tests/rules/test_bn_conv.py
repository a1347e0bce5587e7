from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fusecli import fuse
from fusecli.errors import ExitCode, UsageError
from tests import nets
from tests.proof.nets import X, bn, conv, net
from tests.rules.wired import (
    DTYPES,
    PlainBatchNorm2d,
    PlainConv2d,
    assert_rounded_once,
    classes,
    folded,
    fused,
    hooked,
    left,
    lost_hooks,
    refusal,
)

relu = torch.relu
SHAPES = {1: (2, 4, 9), 2: (2, 4, 9, 8), 3: (2, 4, 5, 6, 7)}
PAIR = ["bn", "conv"]


def pair(layer: nn.Module | None = None, norm: nn.Module | None = None) -> Any:
    """A norm with nothing before it, and a convolution."""
    return net(lambda m, x: relu(m.conv(m.bn(x))), bn=norm or bn(), conv=layer or nn.Conv2d(3, 4, 3))


def wired(wiring: Any, **modules: Any) -> Any:
    return net(wiring, bn=bn(), **{"conv": nn.Conv2d(3, 3, 3, padding=0), **modules})


def tied() -> Any:
    model = wired(lambda m, x: m.conv(m.bn(x)) + m.other(x), other=nn.Conv2d(3, 3, 3))
    model.other.weight = model.conv.weight
    return model


def also_read(m: Any, x: torch.Tensor) -> Any:
    y = m.bn(x)
    return m.conv(y).mean() + y


def weight_norm(layer: nn.Module) -> nn.Module:
    normed: nn.Module = nn.utils.parametrizations.weight_norm(layer)
    return normed


REFUSED: dict[str, tuple[Any, str]] = {
    "another reader": (wired(also_read), "multiple-consumers"),
    "the output": (wired(lambda m, x: (m.conv(y := m.bn(x)), y)), "multiple-consumers"),
    "zeros around": (pair(conv()), "padding-border"),
    "same": (pair(nn.Conv2d(3, 4, 3, padding="same")), "padding-border"),
    "zeros on one axis": (pair(nn.Conv2d(3, 4, 3, padding=(0, 1))), "padding-border"),
    "transposed": (pair(nn.ConvTranspose2d(3, 4, 3)), "transposed-shift"),
    "transposed, without overlap": (pair(nn.ConvTranspose2d(3, 4, 2, stride=2)), "transposed-shift"),
    "tied": (tied(), "tied-weights"),
    "weight read elsewhere": (
        wired(lambda m, x: m.conv(m.bn(x)) + F.conv2d(x, m.conv.weight)),
        "shared-weight",
    ),
    "called without the norm too": (wired(lambda m, x: m.conv(m.bn(x)) + m.conv(x)), "shared-module"),
    "an activation between": (wired(lambda m, x: m.conv(relu(m.bn(x)))), "no-linear-consumer"),
    "max-pooling": (wired(lambda m, x: m.conv(F.max_pool2d(m.bn(x), 2))), "no-linear-consumer"),
    "zeros by a function": (wired(lambda m, x: m.conv(F.pad(m.bn(x), (1, 1)))), "no-linear-consumer"),
    "zeros that a mean counts": (wired(lambda m, x: m.conv(F.avg_pool2d(m.bn(x), 2, 1, 1))), "bn-axis"),
    "a sum": (wired(lambda m, x: m.conv(m.bn(x) + x)), "no-linear-consumer"),
    "another axis": (
        wired(lambda m, x: m.conv(m.bn(x).permute(0, 3, 1, 2)), conv=nn.Conv2d(8, 2, 3)),
        "bn-axis",
    ),
    "pads in its forward": (pair(nets.SamePadConv2d(3, 4, 3)), "not-linear-in-weight"),
    "standardises its weight": (pair(nets.StandardisedConv2d(3, 4, 3)), "not-linear-in-weight"),
    "takes more than one tensor": (
        wired(lambda m, x: m.conv(m.bn(x), 2.0), conv=nets.BrokenConv2d(3, 4, 3)),
        "not-linear-in-weight",
    ),
    "ignores its bias": (pair(nets.BiasBlindConv2d(3, 4, 3)), "bias-not-read"),
    "a norm that does more": (pair(norm=nets.ReluNorm2d(3)), "not-affine"),
    "an activation inside": (pair(norm=nets.BatchNormAct2d(3, nn.SiLU())), "no-rule"),
    "no statistics": (pair(norm=bn(track_running_stats=False)), "no-statistics"),
    "weight_norm": (pair(weight_norm(nn.Conv2d(3, 4, 3))), "parametrized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    model, code = REFUSED[case]
    assert refusal(model, X, PAIR) == code


def test_the_shapes_do_not_fit_into_a_list_of_the_wrong_order() -> None:
    with pytest.raises(UsageError, match=r"did you mean \[conv, bn\]"):
        fuse(nets.conv_bn(), X, groups=[["bn", "conv"]])


def test_hooks_cannot_follow_a_norm_into_two_layers() -> None:
    model = wired(lambda m, x: m.conv(y := m.bn(x)) * m.other(y), other=nn.Conv2d(3, 3, 3))
    model.bn.register_forward_hook(lambda *_: None)
    assert refusal(model, X, [*PAIR, "other"]) == "shared-module"


def test_two_norms_before_one_layer() -> None:
    model = wired(lambda m, x: m.conv(m.bn(x)) + m.conv(m.other(x)), other=bn())
    assert refusal(model, X, ["bn", "other", "conv"]) == "shared-module"


def test_a_padded_reader_forbids_the_fold_into_the_other() -> None:
    model = wired(lambda m, x: m.conv(y := m.bn(x)).mean() + m.other(y), other=conv())
    assert refusal(model, X, [*PAIR, "other"]) == "padding-border"
    assert left(model, X) == "padding-border"


def test_no_shift_under_zeros_is_folded_only_where_somebody_asked() -> None:
    """Which tensors are 0 is chance: what is discovered must not depend on it."""
    model = pair(conv(3, 4, bias=False), bn(affine=False))
    model.bn.running_mean.zero_()
    once = fused(model, X, "bn conv").model
    assert list(once.state_dict()) == ["conv.weight"]
    assert left(model, X) == "padding-border"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", SHAPES)
def test_ranks_groups_bias(rank: int, groups: int, bias: bool) -> None:
    layer = nets.CONV[rank](4, 8, 3, stride=2, groups=groups, bias=bias)
    model = pair(layer, nets.BATCH_NORM[rank](4, eps=1e-2))
    once = fused(model, nets.images(*SHAPES[rank])).model
    assert classes(once, "bn", "conv") == ["Identity", f"Conv{rank}d"]
    assert list(once.state_dict()) == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (2, 0), "same"])
def test_padding_that_repeats(mode: Any, padding: Any) -> None:
    folded(pair(nn.Conv2d(3, 4, 3, padding=padding, padding_mode=mode)), X, "bn_conv", "bn conv")


LAYERS: dict[str, nn.Module] = {
    "a pointwise transposed one": nn.ConvTranspose2d(3, 4, 1),
    "the same with groups": nn.ConvTranspose2d(3, 6, 1, groups=3, bias=False),
    "a subclass": PlainConv2d(3, 4, 3),
    "a subclass that pads nothing here": nets.SamePadConv2d(3, 4, 1),
    "dilation": nn.Conv2d(3, 4, 3, dilation=2),
}


@pytest.mark.parametrize("case", LAYERS)
def test_other_layers(case: str) -> None:
    folded(pair(LAYERS[case]), X, "bn_conv", "bn conv")


@pytest.mark.parametrize(
    "norm",
    [
        bn(affine=False),
        PlainBatchNorm2d(3),
        nets.FrozenBatchNorm2d(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.SyncBatchNorm(3),
    ],
    ids=["plain", "subclass", "frozen", "instance", "sync"],
)
def test_other_norms(norm: nn.Module) -> None:
    assert classes(folded(pair(norm=norm), X, "bn_conv", "bn conv"), "bn") == ["Identity"]


def test_all_that_read_it() -> None:
    def read(m: Any, x: torch.Tensor) -> Any:
        y = m.bn(x)
        return m.conv(y).sigmoid() * m.other(F.pad(y, (1, 1, 1, 1), mode="reflect"))[..., :6, :6]

    once = folded(wired(read, other=nn.Conv2d(3, 3, 3)), X, "bn_conv", "bn conv other")
    assert classes(once, "bn", "conv", "other") == ["Identity", "Conv2d", "Conv2d"]


def test_beside_a_tensor_that_no_norm_has_seen() -> None:
    def joined(m: Any, x: torch.Tensor) -> Any:
        return m.conv(torch.cat([m.bn(relu(x)), x], 1))

    once = folded(wired(joined, conv=nn.Conv2d(6, 3, 3)), X, "bn_conv", "bn conv")
    assert classes(once, "bn") == ["Identity"]


def test_called_twice_each_time_behind_the_norm() -> None:
    folded(wired(lambda m, x: m.conv(m.bn(x)) * m.conv(m.bn(relu(x)))), X, "bn_conv", "bn conv")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(dtype: torch.dtype) -> None:
    assert_rounded_once(pair(), X, dtype)


def test_hooks() -> None:
    calls: list[str] = []
    outcome = fused(hooked(hooked(pair(), "bn", calls), "conv", calls), X)
    calls.clear()
    outcome.model(X)
    assert calls == ["bn takes", "conv gives"]
    assert sorted(lost_hooks(outcome)) == ["bn", "conv"]


def test_a_layer_of_the_model_is_left_alone_that_is_excluded() -> None:
    outcome = fuse(pair(), X, spec={"discover": True, "exclude": ["conv"]})
    assert (outcome.exit_code, outcome.groups) == (ExitCode.NOTHING, ())
