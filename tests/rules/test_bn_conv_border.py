from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fusecli
from fusecli.errors import ExitCode
from fusecli.outcome import Outcome
from tests.nets import float64
from tests.proof.nets import bn, conv, net
from tests.rules.side_by_side import relative_error
from tests.rules.wired import PlainConv2d, classes, left

SHAPES = {1: (2, 4, 9), 2: (2, 4, 9, 8), 3: (2, 4, 5, 6, 7)}
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def pair(layer: nn.Module, norm: nn.Module) -> Any:
    return net(lambda m, x: torch.relu(m.conv(m.bn(x))), bn=norm, conv=layer)


def allowed(model: nn.Module, x: Any) -> Outcome:
    return fusecli.fuse(model, x, spec={"discover": True, "allow_restructure": True})


def test_it_has_to_be_allowed() -> None:
    assert left(pair(conv(4, 4), bn(4)), torch.randn(SHAPES[2])) == "padding-border"


def test_a_class_that_is_not_known() -> None:
    outcome = allowed(pair(PlainConv2d(4, 4, 3, padding=1), bn(4)), torch.randn(SHAPES[2]))
    assert (outcome.groups, [norm.code for norm in outcome.unfused]) == ((), ["fixed-size"])


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_channel_without_a_scale(shift: float) -> None:
    model = pair(conv(4, 4), bn(4))
    with torch.no_grad():
        model.bn.weight[1], model.bn.bias[1] = 0.0, shift
    outcome = allowed(model, torch.randn(SHAPES[2]))
    if shift:  # whatever is padded, the norm makes of it what it makes of all
        assert [norm.code for norm in outcome.unfused] == ["padding-border"]
    else:
        assert outcome.status == "fused"


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize(
    "how",
    [
        {"padding": 1},
        {"padding": 2, "dilation": 2, "groups": 2, "bias": False},
        {"padding": "same", "kernel_size": 4},
        {"padding": 1, "stride": 2},
    ],
    ids=str,
)
def test_it_pads_what_the_norm_makes_zero_of(rank: int, how: dict[str, Any]) -> None:
    model = float64(pair(CONVS[rank](4, 6, **{"kernel_size": 3, **how}), NORMS[rank](4)))
    x = torch.randn(SHAPES[rank], dtype=torch.float64)
    outcome = allowed(model, x)
    assert [group.rule for group in outcome.groups] == ["bn_conv_border"]
    fused: Any = outcome.model
    assert classes(fused, "bn", "conv") == ["Identity", f"BorderedConv{rank}d"]
    assert sorted(fused.state_dict()) == ["conv.bias", "conv.border", "conv.weight"]
    for inputs in (
        x,
        torch.randn(3, *(size + 1 if axis else size for axis, size in enumerate(x.shape[1:]))).double(),
    ):
        assert relative_error(fused(inputs), model(inputs)) < 1e-12
    assert fusecli.verify(model, fused, x).equivalent


def test_where_nothing_is_padded_the_class_stays() -> None:
    outcome = allowed(pair(nn.Conv2d(4, 4, 3), bn(4)), torch.randn(SHAPES[2]))
    assert [group.rule for group in outcome.groups] == ["bn_conv"]


def test_a_list_is_refused_unless_it_is_allowed() -> None:
    model, x = pair(conv(4, 4), bn(4)), torch.randn(SHAPES[2])
    outcome = fusecli.fuse(model, x, groups=["bn", "conv"])
    assert (outcome.exit_code, [no.code for no in outcome.refused]) == (ExitCode.REFUSED, ["padding-border"])
    outcome = fusecli.fuse(model, x, spec={"groups": ["bn", "conv"], "allow_restructure": True})
    assert outcome.status == "fused"
