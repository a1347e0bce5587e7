from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import nets
from tests.proof.nets import X, bn, net
from tests.rules.wired import (
    DTYPES,
    assert_rounded_once,
    classes,
    folded,
    fused,
    hooked,
    lost_hooks,
    refusal,
)

relu = torch.relu
ROWS = nets.images(4, 6)


class PlainLinear(nn.Linear):
    """A subclass that does nothing else."""


class CosineLinear(nn.Linear):
    """Normalises its weight in forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


def pair(layer: nn.Module | None = None, norm: nn.Module | None = None) -> Any:
    layer = layer or nn.Linear(6, 3)
    return net(lambda m, x: relu(m.linear(m.bn(x))), bn=norm or nn.BatchNorm1d(6), linear=layer)


def wired(wiring: Any, linear: nn.Module, norm: nn.Module | None = None) -> Any:
    return net(wiring, bn=norm or bn(), linear=linear)


def tied() -> Any:
    model = net(
        lambda m, x: m.linear(m.bn(x)) + m.other(x),
        bn=nn.BatchNorm1d(6),
        linear=nn.Linear(6, 3),
        other=nn.Linear(6, 3),
    )
    model.other.weight = model.linear.weight
    return model


REFUSED: dict[str, tuple[Any, torch.Tensor, str]] = {
    # The channels stand on axis 1, the features on the last; of one size nothing but the labels tells.
    "no channels": (wired(lambda m, x: m.linear(m.bn(x)), nn.Linear(8, 2)), X, "bn-axis"),
    "no channels, of one size": (
        wired(lambda m, x: m.linear(m.bn(x)), nn.Linear(8, 2), bn(8)), nets.images(2, 8, 8, 8), "bn-axis"),
    "flattened wrongly": (wired(lambda m, x: m.linear(m.bn(x).flatten(0, 1)), nn.Linear(8, 2)), X, "bn-axis"),
    "max-pooling": (
        wired(lambda m, x: m.linear(F.max_pool2d(m.bn(x), 2).flatten(1)), nn.Linear(48, 2)),
        X, "no-linear-consumer"),
    "an activation between": (
        wired(lambda m, x: m.linear(relu(m.bn(x))), nn.Linear(6, 3), nn.BatchNorm1d(6)),
        ROWS, "no-linear-consumer"),
    "another reader": (
        wired(lambda m, x: m.linear(y := m.bn(x)).sum() + y, nn.Linear(6, 3), nn.BatchNorm1d(6)),
        ROWS, "multiple-consumers"),
    "the output": (
        wired(lambda m, x: (m.linear(y := m.bn(x)), y), nn.Linear(6, 3), nn.BatchNorm1d(6)),
        ROWS, "multiple-consumers"),
    "tied": (tied(), ROWS, "tied-weights"),
    "not linear in its weight": (pair(CosineLinear(6, 3)), ROWS, "not-linear-in-weight"),
    "a hidden state is a norm of each input": (pair(norm=nn.LayerNorm(6, elementwise_affine=False)), ROWS,
        "batch-dependent"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    model, x, code = REFUSED[case]
    assert refusal(model, x, ["bn", "linear"]) == code


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_rows(bias: bool, affine: bool) -> None:
    model = pair(nn.Linear(6, 3, bias), nn.BatchNorm1d(6, affine=affine, eps=1e-2))
    once = folded(model, ROWS, "bn_linear", "bn linear")
    assert classes(once, "bn", "linear") == ["Identity", "Linear"]
    assert list(once.state_dict()) == ["linear.weight", "linear.bias"]


THROUGH: dict[str, tuple[Any, nn.Module, nn.Module, torch.Tensor]] = {
    "a flatten": (lambda m, x: m.linear(m.bn(x).flatten(1)), bn(), nn.Linear(192, 2), X),
    "a mean": (lambda m, x: m.linear(m.bn(x).mean((2, 3))), bn(), nn.Linear(3, 2), X),
    "a pooling and a flatten": (
        lambda m, x: m.linear(F.avg_pool2d(m.bn(x), 2).flatten(1)), bn(), nn.Linear(48, 2), X),
    "a transpose": (
        lambda m, x: m.linear(m.bn(x).transpose(1, 2)), nn.BatchNorm1d(5), nn.Linear(5, 2),
        nets.images(2, 5, 7)),
    "a permute": (lambda m, x: m.linear(m.bn(x).permute(0, 2, 3, 1)), bn(), nn.Linear(3, 2), X),
    "a dropout": (
        lambda m, x: m.linear(F.dropout(m.bn(x), training=m.training)), nn.BatchNorm1d(6), nn.Linear(6, 2),
        ROWS),
    "a slice": (lambda m, x: m.linear(m.bn(x)[:, 2:]), nn.BatchNorm1d(6), nn.Linear(4, 2), ROWS),
    "channels in another order": (
        lambda m, x: m.linear(m.bn(x).flip(1)), nn.BatchNorm1d(6), nn.Linear(6, 2), ROWS),
    "two calls": (
        lambda m, x: m.linear(m.bn(x)) * m.linear(m.bn(-x)), nn.BatchNorm1d(6), nn.Linear(6, 2), ROWS),
    "a subclass": (lambda m, x: m.linear(m.bn(x)), nn.BatchNorm1d(6), PlainLinear(6, 2), ROWS),
}  # fmt: skip


@pytest.mark.parametrize("case", THROUGH)
def test_through(case: str) -> None:
    wiring, norm, linear, x = THROUGH[case]
    folded(net(wiring, bn=norm, linear=linear), x, "bn_linear", "bn linear")


def test_a_linear_layer_and_a_convolution() -> None:
    model = net(
        lambda m, x: m.linear((y := m.bn(x)).flatten(1)).sum() + m.conv(y),
        bn=bn(),
        linear=nn.Linear(192, 2),
        conv=nn.Conv2d(3, 2, 3),
    )
    folded(model, X, "bn_linear+bn_conv", "bn linear conv")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(dtype: torch.dtype) -> None:
    assert_rounded_once(pair(), ROWS, dtype)


def test_hooks() -> None:
    calls: list[str] = []
    outcome = fused(hooked(hooked(pair(), "bn", calls), "linear", calls), ROWS)
    calls.clear()
    outcome.model(ROWS)
    assert calls == ["bn takes", "linear gives"]
    assert sorted(lost_hooks(outcome)) == ["bn", "linear"]
