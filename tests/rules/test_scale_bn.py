from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import nets
from tests.proof.nets import X, bn, net
from tests.rules.wired import (
    DTYPES,
    Affine,
    LayerScale,
    Normalise,
    PlainBatchNorm2d,
    assert_rounded_once,
    classes,
    folded,
    fused,
    hooked,
    lost_hooks,
    refusal,
)

relu = torch.relu


def pair(scale: nn.Module | None = None, norm: nn.Module | None = None) -> Any:
    """The scale is the first thing that happens; an activation stands behind the norm."""
    return net(lambda m, x: relu(m.bn(m.scale(x))), scale=scale or Normalise(3), bn=norm or bn())


def also_read(m: Any, x: torch.Tensor) -> Any:
    y = m.scale(x)
    return relu(m.bn(y)) + y


REFUSED: dict[str, Any] = {
    "another reader": net(also_read, scale=Normalise(3), bn=bn()),
    "the output": net(lambda m, x: (m.bn(y := m.scale(x)), y), scale=Normalise(3), bn=bn()),
    "an activation between": net(lambda m, x: m.bn(relu(m.scale(x))), scale=Normalise(3), bn=bn()),
    "an axis that has no channels": pair(LayerScale(8)),
    "several axes": pair(LayerScale(3, 8, 1)),
    "the scale is the input's": net(lambda m, x: relu(m.bn(m.scale(x) * x)), scale=Normalise(3), bn=bn()),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    refusal(REFUSED[case], X, ["scale", "bn"])


def test_a_norm_without_weight_and_bias_is_refused() -> None:
    assert refusal(pair(norm=bn(affine=False)), X, ["scale", "bn"]) == "no-weight"


SCALES: dict[str, Any] = {
    "mean and std": Normalise(3),
    "a scale alone": LayerScale(3, 1, 1),
    "a scalar": LayerScale(1),
    "an affine": Affine(1, 3, 1, 1),
}


@pytest.mark.parametrize("norm", [bn(eps=1e-2), PlainBatchNorm2d(3)], ids=["exact", "subclass"])
@pytest.mark.parametrize("case", SCALES)
def test_the_norm_takes_it_over(case: str, norm: nn.Module) -> None:
    model = pair(SCALES[case], norm)
    once = folded(model, X, "scale_bn", "scale bn")
    assert classes(once, "scale", "bn") == ["Identity", type(norm).__name__]
    assert list(once.state_dict()) == [key for key in model.state_dict() if key.startswith("bn.")]
    for key in ("bn.running_mean", "bn.running_var"):
        assert torch.equal(once.state_dict()[key], model.state_dict()[key])


def test_two_norms_that_read_it() -> None:
    def both(m: Any, x: torch.Tensor) -> Any:
        y = m.scale(x)
        return relu(m.bn(y)) * relu(m.other(y))

    once = folded(
        net(both, scale=Normalise(3), bn=bn(), other=bn()),
        X,
        "scale_bn",
        "scale bn other",
    )
    assert classes(once, "scale") == ["Identity"]


def test_a_norm_and_a_layer_that_read_it() -> None:
    def both(m: Any, x: torch.Tensor) -> Any:
        y = m.scale(x)
        return relu(m.bn(y)).mean() + relu(m.conv(y))

    parts: dict[str, Any] = {"scale": Normalise(3), "bn": bn(), "conv": nn.Conv2d(3, 2, 3)}
    folded(net(both, **parts), X, "scale_bn+gain_linear", "scale bn conv")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(dtype: torch.dtype) -> None:
    model = pair()
    model.scale.std.abs_().add_(0.5)  # in bfloat16 a division by next to nothing is mostly noise
    assert_rounded_once(model, X, dtype)


def test_hooks() -> None:
    calls: list[str] = []
    outcome = fused(hooked(hooked(pair(), "scale", calls), "bn", calls), X)
    calls.clear()
    outcome.model(X)
    assert calls == ["scale takes", "bn gives"]
    assert lost_hooks(outcome) == ["bn", "scale"]


def test_images_of_other_sizes() -> None:
    model = pair()
    once = fused(model, X).model
    other = nets.images(1, 3, 5, 7)
    assert torch.allclose(once(other), model(other), rtol=1e-4, atol=1e-5)
