from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from tests import nets
from tests.proof.nets import X, conv, net
from tests.rules.wired import (
    DTYPES,
    Affine,
    LayerScale,
    Normalise,
    RMSNorm,
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


class Plus1(RMSNorm):
    """Gemma's: the parameter is the gain less 1."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())


class ChannelsFirst(nn.Module):
    """ConvNeXt's LayerNorm of images."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class GainedTwice(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x).softmax(-1))


class Inside(nn.Module):
    """Takes its mean out of the input before its own layer reads it."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(3, 1, 1))
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x - self.mean)
        return y


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(6, 6, bias)


def attention(norm: nn.Module, **more: Any) -> Any:
    """q, k and v read the norm; the tokens go past it."""

    def wiring(m: Any, x: Tensor) -> Any:
        y = m.norm(x)
        return x + (m.q(y) @ m.k(y).transpose(-1, -2)).softmax(-1) @ m.v(y)

    return net(wiring, norm=norm, q=linear(), k=linear(False), v=linear(), **more)


def alone(norm: nn.Module, layer: nn.Module) -> Any:
    return net(lambda m, x: relu(m.layer(m.norm(x))), norm=norm, layer=layer)


def language_model() -> Any:
    """The head's weight is that of the embedding."""
    parts: dict[str, Any] = {
        "embed": nn.Embedding(9, 6),
        "norm": nn.LayerNorm(6),
        "head": nn.Linear(6, 9, bias=False),
    }
    model = net(lambda m, x: m.head(m.norm(m.embed(x))), **parts)
    model.head.weight = model.embed.weight
    return model


def test_a_tied_head_is_refused() -> None:
    words = torch.arange(8).reshape(2, 4)
    assert refusal(language_model(), words, ["norm", "head"]) == "tied-weights"
    assert left(language_model(), words) == "tied-weights"


READ: dict[str, Any] = {
    "a residual": net(lambda m, x: m.layer(y := m.norm(x)) + y, norm=RMSNorm(6), layer=linear()),
    "the output": net(lambda m, x: (m.layer(y := m.norm(x)), y), norm=RMSNorm(6), layer=linear()),
    "an activation": net(lambda m, x: m.layer(relu(m.norm(x))), norm=RMSNorm(6), layer=linear()),
    "a gain that is used twice": alone(GainedTwice(6), linear()),
    "no gain": alone(nn.LayerNorm(6, elementwise_affine=False), linear()),
    "a gain of two axes": alone(nn.LayerNorm((5, 6)), linear()),
}


@pytest.mark.parametrize("case", READ)
def test_refused(case: str) -> None:
    refusal(READ[case], TOKENS, ["norm", "layer"])
    left(READ[case], TOKENS)


def test_one_reader_that_is_not_listed_forbids_it() -> None:
    refusal(attention(RMSNorm(6)), TOKENS, ["norm", "q", "k"])
    outcome = fusecli.fuse(attention(RMSNorm(6)), TOKENS, spec={"discover": True, "exclude": ["v"]})
    assert outcome.groups == ()


PADDED: dict[str, nn.Module] = {
    "mean and std": Normalise(3),
    "a GroupNorm": nn.GroupNorm(1, 3),
    "a LayerNorm of images": ChannelsFirst(3),
    "an affine": Affine(3, 1, 1),
}


@pytest.mark.parametrize("case", PADDED)
def test_a_shift_under_zeros_is_refused(case: str) -> None:
    assert left(alone(PADDED[case], conv()), X) in ("", "padding-border")
    if case != "a GroupNorm":
        assert refusal(alone(PADDED[case], conv()), X, ["norm", "layer"]) == "padding-border"


def test_a_shift_before_a_transposed_convolution_is_refused() -> None:
    model = alone(Normalise(3), nn.ConvTranspose2d(3, 2, 3))
    assert refusal(model, X, ["norm", "layer"]) == "transposed-shift"


NORMS: dict[str, tuple[nn.Module, float]] = {
    # the norm, and the value of its weight that does nothing
    "layer norm": (nn.LayerNorm(6), 1.0),
    "layer norm without bias": (nn.LayerNorm(6, bias=False), 1.0),
    "rms norm": (nn.RMSNorm(6), 1.0),
    "one's own": (RMSNorm(6), 1.0),
    "one's own, from 0": (Plus1(6), 0.0),
}


@pytest.mark.parametrize("case", NORMS)
def test_the_gain_goes_into_every_reader(case: str) -> None:
    norm, neutral = NORMS[case]
    model = attention(norm)
    once = folded(model, TOKENS, "gain_linear", "norm q k v")
    assert classes(once, "norm", "q") == [type(norm).__name__, "Linear"]
    assert bool((once.norm.weight == neutral).all())
    shifts = getattr(model.norm, "bias", None) is not None
    assert not shifts or not once.norm.bias.any()
    # Only a shift needs a bias.
    added = ["k.bias"] if shifts else []
    assert sorted(once.state_dict()) == sorted([*model.state_dict(), *added])


LAYERS: dict[str, tuple[nn.Module, nn.Module]] = {
    "group norm into a convolution": (nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 3)),
    "layer norm of images": (ChannelsFirst(3), nn.Conv2d(3, 2, 3)),
    "a scale under zeros": (LayerScale(3, 1, 1), conv()),
    "a scale before a transposed convolution": (LayerScale(3, 1, 1), nn.ConvTranspose2d(3, 4, 3, stride=2)),
    "mean and std": (Normalise(3), nn.Conv2d(3, 2, 3, stride=2, bias=False)),
    "mean and std, groups": (Normalise(3), nn.Conv2d(3, 6, 3, groups=3)),
    "mean and std, reflected": (Normalise(3), conv(padding_mode="reflect")),
    "an affine": (Affine(3, 1, 1), nn.Conv2d(3, 2, 1)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case: str) -> None:
    norm, layer = LAYERS[case]
    once = folded(alone(norm, layer), X, "gain_linear", "norm layer")
    whole = isinstance(norm, LayerScale | Affine | Normalise)
    assert classes(once, "norm") == ["Identity" if whole else type(norm).__name__]


def test_a_block_that_scales_what_its_own_layer_reads() -> None:
    once = folded(net(lambda m, x: m.block(x), block=Inside()), X, "gain_linear", "block block.conv")
    assert not once.block.mean.any()


def test_a_gain_under_zeros() -> None:
    """A GroupNorm without a shift: 0 times a gain is 0."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x / (1 + x.abs().mean(1, keepdim=True)))

    folded(alone(Gain(), conv(bias=False)), X, "gain_linear", "norm layer")


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), RMSNorm(6)], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(dtype: torch.dtype, norm: nn.Module) -> None:
    assert_rounded_once(attention(norm), TOKENS, dtype)


def test_the_hooks_of_a_norm_that_stays_stay() -> None:
    calls: list[str] = []
    model = hooked(alone(nn.LayerNorm(6), linear()), "norm", calls)
    outcome = fused(model, TOKENS)
    calls.clear()
    outcome.model(TOKENS)
    assert calls == ["norm takes", "norm gives"]
    assert lost_hooks(outcome) == []


def test_hooks_of_one_that_goes() -> None:
    calls: list[str] = []
    outcome = fused(hooked(hooked(alone(Normalise(3), nn.Conv2d(3, 2, 3)), "norm", calls), "layer", calls), X)
    calls.clear()
    outcome.model(X)
    assert calls == ["norm takes", "layer gives"]
    assert sorted(lost_hooks(outcome)) == ["layer", "norm"]
