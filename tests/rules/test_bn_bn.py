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
    LayerScale,
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
SHAPES = {1: (4, 3, 5), 2: (2, 3, 5, 4), 3: (2, 3, 3, 4, 2)}


def pair(first: nn.Module | None = None, second: nn.Module | None = None) -> Any:
    """relu -> a -> b -> relu: no layer could take either of them."""
    return net(lambda m, x: relu(m.b(m.a(relu(x)))), a=first or bn(), b=second or bn())


def also_read(m: Any, x: torch.Tensor) -> Any:
    y = m.a(relu(x))
    return relu(m.b(y)) + y


def given_back(m: Any, x: torch.Tensor) -> Any:
    y = m.a(relu(x))
    return relu(m.b(y)), y


def second_elsewhere(m: Any, x: torch.Tensor) -> Any:
    return relu(m.b(m.a(relu(x)))) + relu(m.b(relu(-x)))


REFUSED: dict[str, tuple[Any, str]] = {
    "another reader": (net(also_read, a=bn(), b=bn()), "multiple-consumers"),
    "the output": (net(given_back, a=bn(), b=bn()), "multiple-consumers"),
    "an activation between": (
        net(lambda m, x: m.b(relu(m.a(relu(x)))), a=bn(), b=bn()),
        "no-linear-consumer",
    ),
    "the second is called elsewhere": (net(second_elsewhere, a=bn(), b=bn()), "shared-module"),
    "no weight and bias": (pair(bn(affine=False)), "no-weight"),
    "max-pooling": (
        net(lambda m, x: m.b(F.max_pool2d(m.a(relu(x)), 2)), a=bn(), b=bn()),
        "no-linear-consumer",
    ),
    "another axis": (
        net(lambda m, x: relu(m.b(m.a(relu(x)).transpose(1, 2))), a=bn(8), b=bn(8)),
        "bn-axis",
    ),
    "a ReLU inside of the first": (pair(nets.ReluNorm2d(3)), "not-affine"),
    "no statistics": (pair(bn(track_running_stats=False)), "no-statistics"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    model, code = REFUSED[case]
    x = nets.images(2, 8, 8, 8) if case == "another axis" else X
    assert refusal(model, x, ["a", "b"]) == code


def test_tied_vectors_are_refused() -> None:
    model = pair()
    model.b.weight = model.a.weight
    assert refusal(model, X, ["a", "b"]) == "tied-weights"


def test_broken_statistics_are_refused() -> None:
    model = pair()
    model.b.running_var[1] = -1.0
    assert refusal(model, X, ["a", "b"]) == "bad-statistics"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("rank", SHAPES)
def test_two_in_a_row_are_one(rank: int, affine: bool) -> None:
    model = pair(nets.BATCH_NORM[rank](3, eps=1e-2), nets.BATCH_NORM[rank](3, affine=affine))
    once = folded(model, nets.images(*SHAPES[rank]), "bn_bn", "a b")
    assert classes(once, "a", "b") == [f"BatchNorm{rank}d", "Identity"]
    assert list(once.state_dict()) == [key for key in model.state_dict() if key.startswith("a.")]
    kept = ("a.running_mean", "a.running_var", "a.num_batches_tracked")
    assert all(torch.equal(once.state_dict()[key], model.state_dict()[key]) for key in kept)


SECOND: dict[str, Any] = {
    "a subclass": (PlainBatchNorm2d(3), PlainBatchNorm2d(3)),
    "a frozen norm": (bn(), nets.FrozenBatchNorm2d(3)),
    "a LayerScale": (bn(), LayerScale(3, 1, 1)),
    "a scalar": (bn(), LayerScale(1)),
    "an instance norm with statistics": (bn(), nn.InstanceNorm2d(3, track_running_stats=True)),
}


@pytest.mark.parametrize("case", SECOND)
def test_other_maps(case: str) -> None:
    assert classes(folded(pair(*SECOND[case]), X, "bn_bn", "a b"), "b") == ["Identity"]


def test_three_in_a_row() -> None:
    model = net(lambda m, x: relu(m.c(m.b(m.a(relu(x))))), a=bn(), b=bn(), c=bn())
    assert classes(folded(model, X, "bn_bn", "a b c"), "a", "b", "c") == [
        "BatchNorm2d",
        "Identity",
        "Identity",
    ]


def test_both_go_on_into_a_layer() -> None:
    model = net(lambda m, x: relu(m.b(m.a(m.c(x)))), c=nn.Conv2d(3, 3, 3), a=bn(), b=bn())
    assert classes(folded(model, X, "bn_bn+conv_bn", "c a b"), "a", "b") == ["Identity", "Identity"]


def test_across_a_pooling() -> None:
    folded(net(lambda m, x: relu(m.b(F.avg_pool2d(m.a(relu(x)), 2))), a=bn(), b=bn()), X, "bn_bn", "a b")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(dtype: torch.dtype) -> None:
    assert_rounded_once(pair(), X, dtype)


def test_hooks() -> None:
    calls: list[str] = []
    outcome = fused(hooked(hooked(pair(), "a", calls), "b", calls), X)
    calls.clear()
    outcome.model(X)
    assert calls == ["a takes", "b gives"]
    assert lost_hooks(outcome) == ["a", "b"]
