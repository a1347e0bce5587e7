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
TOKENS = nets.images(2, 5, 6)
PAIR = ["layer", "scale"]


class Gate(LayerScale):
    """Scales by its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma * x


class Under(LayerScale):
    """Divides by its input."""

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma / x


class Rounded(LayerScale):
    def forward(self, x: Tensor) -> Tensor:
        return torch.div(x, self.gamma, rounding_mode="floor")


class Sigmoid(LayerScale):
    """The factor is computed from its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.sigmoid()


class Reversed(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return self.beta - x / self.alpha


class Twofold(Affine):
    """x alpha - 3 beta, in one op with a factor of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sub(x * self.alpha, self.beta, alpha=3)


class Block(nn.Module):
    """A residual branch whose scale is a parameter of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gamma = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.gamma * self.layer(x)
        return y


def pair(layer: nn.Module | None = None, scale: nn.Module | None = None) -> Any:
    parts: dict[str, Any] = {"layer": layer or conv(3, 4), "scale": scale or LayerScale(4, 1, 1)}
    return net(lambda m, x: relu(m.scale(m.layer(x))), **parts)


def wired(wiring: Any, **modules: Any) -> Any:
    return net(wiring, **{"layer": conv(), "scale": LayerScale(3, 1, 1), **modules})


def tied() -> Any:
    model = wired(lambda m, x: m.scale(m.layer(x)) + m.other(x), other=conv())
    model.other.weight = model.layer.weight
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "another reader": (wired(lambda m, x: m.scale(y := m.layer(x)) + y.mean()), "multiple-consumers"),
    "the output": (wired(lambda m, x: (m.scale(y := m.layer(x)), y)), "multiple-consumers"),
    "an activation between": (wired(lambda m, x: m.scale(relu(m.layer(x)))), "no-linear-producer"),
    "another axis": (pair(conv(), LayerScale(8)), "bn-axis"),
    "several axes": (pair(conv(), LayerScale(3, 8, 1)), "no-rule"),
    "scaled twice by the same": (wired(lambda m, x: m.scale(m.scale(m.layer(x)))), "no-linear-producer"),
    "the factor is read elsewhere": (wired(lambda m, x: m.scale(m.layer(x)) + m.scale.gamma), "no-rule"),
    "scaled without the layer too": (
        wired(lambda m, x: m.scale(m.layer(x)) + m.scale(x)), "no-linear-producer"),
    "called without the scale too": (wired(lambda m, x: m.scale(m.layer(x)) + m.layer(-x)), "shared-module"),
    "tied": (tied(), "tied-weights"),
    "a gate": (pair(scale=Gate(4, 1, 1)), "multiple-consumers"),
    "divided by what flows": (pair(scale=Under(4, 1, 1)), "no-rule"),
    "rounded": (pair(scale=Rounded(4, 1, 1)), "not-affine"),
    "standardised": (pair(nets.StandardisedConv2d(3, 4, 3)), "not-linear-in-weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    model, code = REFUSED[case]
    assert refusal(model, X, PAIR) == code
    assert left(model, X) == ""


def test_a_square_hides_no_wrong_axis() -> None:
    model = net(lambda m, x: m.scale(m.layer(x)), layer=nn.Linear(6, 6), scale=LayerScale(6, 1))
    assert refusal(model, nets.images(2, 6, 6), PAIR) == "bn-axis"


SCALES: dict[str, nn.Module] = {
    "gamma": LayerScale(4, 1, 1),
    "with the batch axis": LayerScale(1, 4, 1, 1),
    "one for all": LayerScale(1),
    "no axis at all": LayerScale(),
    "alpha and beta": Affine(4, 1, 1),
    "beta less x": Reversed(4, 1, 1),
    "a factor in the op": Twofold(4, 1, 1),
    "computed": Sigmoid(4, 1, 1),
}


@pytest.mark.parametrize("case", SCALES)
def test_scales(case: str) -> None:
    once = folded(pair(scale=SCALES[case]), X, "layer_scale", "layer scale")
    assert classes(once, "layer", "scale") == ["Conv2d", "Identity"]
    assert list(once.state_dict()) == ["layer.weight", "layer.bias"]


def test_a_scale_alone_needs_no_bias() -> None:
    once = folded(pair(conv(3, 4, bias=False)), X, "layer_scale", "layer scale")
    assert list(once.state_dict()) == ["layer.weight"]
    once = folded(pair(conv(3, 4, bias=False), Affine(4, 1, 1)), X, "layer_scale", "layer scale")
    assert list(once.state_dict()) == ["layer.weight", "layer.bias"]


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], tuple[int, ...]]] = {
    # layer, shape of gamma, shape of the input
    "linear, rows": (nn.Linear(6, 4), (4,), (5, 6)),
    "linear, tokens": (nn.Linear(6, 4, bias=False), (4,), (2, 5, 6)),
    "conv1d": (nn.Conv1d(3, 4, 3), (4, 1), (2, 3, 9)),
    "conv3d, groups": (nn.Conv3d(4, 8, 3, groups=2, bias=False), (8, 1, 1, 1), (2, 4, 5, 4, 3)),
    "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (4, 1, 1), (2, 3, 8, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (8, 1, 1), (2, 4, 8, 8)),
    "transposed, groups": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (6, 1, 1), (2, 4, 5, 5)),
    "a subclass": (PlainConv2d(3, 4, 3), (4, 1, 1), (2, 3, 8, 8)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case: str) -> None:
    layer, gamma, shape = LAYERS[case]
    folded(pair(layer, LayerScale(*gamma)), nets.images(*shape), "layer_scale", "layer scale")


def test_a_linear_layer_whose_input_is_no_block_of_memory() -> None:
    """Then torch adds the bias in an op of its own, which is no gain."""
    model = net(
        lambda m, x: m.scale(m.layer(x.flatten(2).transpose(1, 2))),
        layer=nn.Linear(3, 4),
        scale=LayerScale(4),
    )
    folded(model, X, "layer_scale", "layer scale")


def test_a_parameter_of_the_block_around_the_layer() -> None:
    model = net(lambda m, x: m.block(x), block=Block())
    once = folded(model, TOKENS, "layer_scale", "block block.layer")
    assert classes(once, "block", "block.layer") == ["Block", "Linear"]
    assert bool((once.block.gamma == 1).all())
    assert torch.equal(once.block.layer.weight, model.block.layer.weight * model.block.gamma[:, None])


def test_in_a_row_with_a_norm() -> None:
    model = net(
        lambda m, x: relu(m.bn(m.scale(m.layer(x)))), layer=conv(), scale=LayerScale(3, 1, 1), bn=bn()
    )
    once = folded(model, X, "layer_scale+conv_bn", "layer scale bn")
    assert classes(once, "scale", "bn") == ["Identity", "Identity"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(dtype: torch.dtype) -> None:
    assert_rounded_once(pair(scale=Affine(4, 1, 1)), X, dtype)


def test_hooks() -> None:
    calls: list[str] = []
    outcome = fused(hooked(hooked(pair(), "layer", calls), "scale", calls), X)
    calls.clear()
    outcome.model(X)
    assert calls == ["layer takes", "scale gives"]
    assert sorted(lost_hooks(outcome)) == ["layer", "scale"]
