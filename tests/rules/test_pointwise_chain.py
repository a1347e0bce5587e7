from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import nets
from tests.proof.nets import X, bn, conv, net
from tests.rules.wired import (
    DTYPES,
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


def in_a_row(m: Any, x: Tensor) -> Any:
    return relu(m.b(m.a(x)))


def point(inputs: int = 3, outputs: int = 6, bias: bool = False, **attributes: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=bias, **attributes)


def pair(a: nn.Module, b: nn.Module) -> Any:
    return net(in_a_row, a=a, b=b)


def wired(wiring: Any, **modules: Any) -> Any:
    return net(wiring, **{"a": point(3, 6), "b": nn.Conv2d(6, 3, 3), **modules})


def tied() -> Any:
    model = net(lambda m, x: m.b(m.a(x)) + m.c(x), a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8))
    model.c.weight = model.a.weight
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "zeros are padded, not the bias": (pair(point(bias=True), conv(6, 4)), "padding-border"),
    "neither is pointwise": (pair(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)), "not-pointwise"),
    "a strided 1x1": (pair(conv(3, 6), point(6, 2, stride=2)), "not-pointwise"),
    "a padded 1x1": (pair(point(3, 6), point(6, 2, padding=1)), ""),
    "grows": (pair(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 3, 1)), "grows"),
    "grows into the larger kernel": (pair(nn.Conv2d(3, 4, 3), point(4, 40)), "grows"),
    "groups": (pair(conv(3, 3, groups=3), point(3, 4)), "grouped"),
    "an activation between": (wired(lambda m, x: m.b(relu(m.a(x)))), "no-rule"),
    "a pooling between": (wired(lambda m, x: m.b(F.avg_pool2d(m.a(x), 2))), "no-rule"),
    "turned around between": (wired(lambda m, x: m.b(m.a(x).transpose(2, 3))), "no-rule"),
    "another reader": (wired(lambda m, x: m.b(y := m.a(x)) + y.mean()), "no-rule"),
    "the output": (wired(lambda m, x: (m.b(y := m.a(x)), y)), "no-rule"),
    "called twice": (wired(lambda m, x: m.b(m.a(x)) + m.b(m.a(-x))), "no-rule"),
    "another kind": (wired(lambda m, x: m.b(m.a(x)), b=nn.Linear(8, 2)), "shape"),
    "transposed": (pair(nn.ConvTranspose2d(3, 6, 1), point(6, 2)), "no-rule"),
    "tied": (tied(), "tied-weights"),
    "pads in its forward": (pair(point(), nets.SamePadConv2d(6, 3, 3)), "not-linear-in-weight"),
    "the second standardises": (pair(point(), nets.StandardisedConv2d(6, 3, 1)), "not-linear-in-weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in REFUSED if case != "a padded 1x1"])
def test_refused(case: str) -> None:
    model, code = REFUSED[case]
    assert refusal(model, X, ["a", "b"]) == code
    assert left(model, X) == ""


def test_a_padded_kernel_of_one_is_no_pointwise_layer_but_takes_one() -> None:
    folded(REFUSED["a padded 1x1"][0], X, "pointwise_chain", "a b")


def test_a_norm_that_goes_into_the_first_gives_it_a_bias() -> None:
    """Which the zeros around the second do not have: the chain is no longer one."""
    wiring = lambda m, x: relu(m.b(m.n(m.a(x))))  # noqa: E731
    folded(net(wiring, a=point(), n=bn(6), b=conv(6, 4)), X, "conv_bn", "a n")
    once = fused(net(wiring, a=point(), n=bn(6), b=nn.Conv2d(6, 4, 3)), X).model
    assert classes(once, "a", "n", "b") == ["Conv2d", "Identity", "Identity"]


CHAINS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "1x1, 3x3": (point(), conv(6, 4), (2, 3, 8, 8)),
    "1x1 with a bias, unpadded 3x3": (point(bias=True), nn.Conv2d(6, 4, 3, bias=False), (2, 3, 8, 8)),
    "3x3, 1x1": (conv(3, 6), point(6, 2), (2, 3, 8, 8)),
    "3x3 strided, 1x1": (conv(3, 6, stride=2, bias=False), point(6, 2, bias=True), (2, 3, 8, 8)),
    "3x3 that reflects, 1x1": (conv(3, 6, padding_mode="reflect"), point(6, 2), (2, 3, 8, 8)),
    "3x3 dilated and strided, behind 1x1": (
        point(), nn.Conv2d(6, 2, 3, stride=2, dilation=2, padding=1), (2, 3, 9, 8)),
    "1x1, 1x1": (point(), point(6, 2), (2, 3, 8, 8)),
    "groups": (point(4, 8, groups=2), nn.Conv2d(8, 4, 3, groups=2), (2, 4, 8, 8)),
    "conv1d": (nn.Conv1d(3, 6, 1), nn.Conv1d(6, 3, 3), (2, 3, 9)),
    "conv3d": (nn.Conv3d(2, 6, 1, bias=False), nn.Conv3d(6, 3, 3, padding=1), (2, 2, 4, 5, 3)),
    "linear": (nn.Linear(8, 6), nn.Linear(6, 3, bias=False), (4, 8)),
    "linear, tokens": (nn.Linear(8, 6, bias=False), nn.Linear(6, 3), (2, 5, 8)),
    "a subclass that only loses": (point(), PlainConv2d(6, 4, 3), (2, 3, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
def test_chains(case: str) -> None:
    a, b, shape = CHAINS[case]
    biased = a.bias is not None or b.bias is not None
    model = pair(a, b)
    x = nets.images(*shape)
    once = folded(model, x, "pointwise_chain", "a b")
    assert classes(once, "a", "b") == [type(a).__name__, "Identity"]
    assert list(once.state_dict()) == ["a.weight", "a.bias"][: 1 + biased]
    assert once.a.weight.numel() < a.weight.numel() + b.weight.numel()


def test_the_sizes_are_those_of_the_product() -> None:
    once = fused(pair(point(3, 6), nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0))), X).model
    found = {name: getattr(once.a, name) for name in ("in_channels", "out_channels", "kernel_size", "stride")}
    assert found == {"in_channels": 3, "out_channels": 4, "kernel_size": (3, 2), "stride": (2, 1)}
    assert once.a.padding == (1, 0)


def test_a_dropout_between() -> None:
    folded(wired(lambda m, x: m.b(m.drop(m.a(x))), drop=nn.Dropout()), X, "pointwise_chain", "a b")


def test_three_in_a_row() -> None:
    wiring = lambda m, x: m.c(m.b(m.a(x)))  # noqa: E731
    once = fused(net(wiring, a=nn.Linear(8, 7), b=nn.Linear(7, 6), c=nn.Linear(6, 2)), X).model
    assert classes(once, "a", "b", "c") == ["Linear", "Identity", "Identity"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(dtype: torch.dtype) -> None:
    assert_rounded_once(pair(point(), conv(6, 4)), X, dtype)


def test_hooks() -> None:
    calls: list[str] = []
    outcome = fused(hooked(hooked(pair(point(), conv(6, 4)), "a", calls), "b", calls), X)
    calls.clear()
    outcome.model(X)
    assert calls == ["a takes", "b gives"]
    assert sorted(lost_hooks(outcome)) == ["a", "b"]
