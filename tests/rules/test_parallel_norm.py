from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import nets
from tests.proof.nets import X, bn, conv, net
from tests.rules.wired import (
    DTYPES,
    Affine,
    LayerScale,
    PlainBatchNorm2d,
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
PAIR = ["layer", "norm"]


def added(m: Any, x: Tensor) -> Any:
    return relu(m.layer(x) + m.norm(x))


def pair(layer: nn.Module | None = None, norm: nn.Module | None = None) -> Any:
    return net(added, layer=layer or conv(), norm=norm or bn())


def wired(wiring: Any, **modules: Any) -> Any:
    return net(wiring, **{"layer": conv(), "norm": bn(), **modules})


def repvgg(channels: int = 3, groups: int = 1) -> Any:
    """The block as it is trained."""
    return net(
        lambda m, x: relu(m.bn3(m.dense(x)) + m.bn1(m.point(x)) + m.identity(x)),
        dense=conv(channels, channels, groups=groups, bias=False),
        bn3=bn(channels),
        point=nn.Conv2d(channels, channels, 1, groups=groups, bias=False),
        bn1=bn(channels),
        identity=bn(channels),
    )


REFUSED: dict[str, tuple[Any, Tensor]] = {
    "a stride": (pair(nn.Conv2d(3, 3, 1, stride=2)), X[..., :1, :1]),
    "other channels": (pair(conv(3, 1)), X),
    "transposed": (pair(nn.ConvTranspose2d(3, 3, 1)), X),
    "another reader": (wired(lambda m, x: m.layer(x) + (y := m.norm(x)) + relu(y)), X),
    "the output": (wired(lambda m, x: (m.layer(x) + (y := m.norm(x)), y)), X),
    "an activation between": (wired(lambda m, x: m.layer(x) + relu(m.norm(x))), X),
    "an activation inside": (pair(norm=nets.ReluNorm2d(3)), X),
    "two inputs": (wired(lambda m, x: m.layer(x) + m.norm(relu(x))), X),
    "alpha": (wired(lambda m, x: torch.add(m.layer(x), m.norm(x), alpha=2)), X),
    "a difference": (wired(lambda m, x: m.layer(x) - m.norm(x)), X),
    "another axis": (pair(nn.Linear(6, 6), nn.BatchNorm1d(6)), nets.images(2, 6, 6)),
    "a norm of each input": (pair(nn.Linear(6, 6), nn.LayerNorm(6)), nets.images(4, 6)),
    "no statistics": (pair(norm=bn(track_running_stats=False)), X),
    "the norm is called twice": (wired(lambda m, x: m.layer(x) + m.norm(x) + m.norm(-x)), X),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    model, x = REFUSED[case]
    refusal(model, x, PAIR)
    left(model, x)


def test_the_bare_input_has_no_module() -> None:
    left(net(lambda m, x: relu(m.layer(x) + x), layer=conv()), X)


def test_two_norms_have_no_layer_that_could_take_them() -> None:
    refusal(net(lambda m, x: relu(m.a(x) + m.b(x)), a=bn(), b=bn()), X, ["a", "b"])


@pytest.mark.parametrize("groups", [1, 2])
def test_repvgg(groups: int) -> None:
    model = repvgg(4, groups)
    once = folded(
        model,
        nets.images(2, 4, 8, 8),
        "conv_bn+parallel_layers+parallel_norm",
        "dense bn3 point bn1 identity",
    )
    assert classes(once, "dense", "bn3", "point", "identity") == ["Conv2d", "Identity", "Zero", "Zero"]
    assert [tuple(t.shape) for t in once.state_dict().values()] == [(4, 4 // groups, 3, 3), (4,)]


LAYERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(3, 3, 3, padding=1), nn.BatchNorm1d(3), (2, 3, 9)),
    "conv3d": (nn.Conv3d(2, 2, 3, padding=1), nn.BatchNorm3d(2), (2, 2, 4, 5, 3)),
    "pointwise": (nn.Conv2d(3, 3, 1, bias=False), bn(), (2, 3, 8, 8)),
    "depthwise": (conv(4, 4, groups=4), bn(4), (2, 4, 8, 8)),
    "dilated": (nn.Conv2d(3, 3, 3, padding=2, dilation=2), bn(), (2, 3, 8, 8)),
    "reflected": (conv(padding_mode="reflect"), bn(), (2, 3, 8, 8)),
    "same padding of an even kernel": (nn.Conv2d(3, 3, 2, padding="same"), bn(), (2, 3, 8, 8)),
    "linear": (nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), (4, 6)),
    "no affine": (conv(bias=False), bn(affine=False), (2, 3, 8, 8)),
    "a subclass": (conv(), PlainBatchNorm2d(3), (2, 3, 8, 8)),
    "a scale": (conv(bias=False), LayerScale(3, 1, 1), (2, 3, 8, 8)),
    "an affine": (conv(), Affine(3, 1, 1), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case: str) -> None:
    layer, norm, shape = LAYERS[case]
    once = folded(pair(layer, norm), nets.images(*shape), "parallel_norm", "layer norm")
    assert classes(once, "layer", "norm") == [type(layer).__name__, "Zero"]
    shifts = layer.bias is not None or not isinstance(norm, LayerScale)
    assert list(once.state_dict()) == ["layer.weight", "layer.bias"][: 1 + shifts]


def test_beside_an_input_that_stays() -> None:
    folded(wired(lambda m, x: m.layer(x) + m.norm(x) + x), X, "parallel_norm", "layer norm")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(dtype: torch.dtype) -> None:
    assert_rounded_once(repvgg(), X, dtype)


def test_hooks_are_lost_and_said_to_be() -> None:
    calls: list[str] = []
    outcome = fused(hooked(hooked(pair(), "layer", calls), "norm", calls), X)
    calls.clear()
    outcome.model(X)
    assert calls == ["layer takes"]
    assert sorted(lost_hooks(outcome)) == ["layer", "norm", "norm"]
