"""The code of every norm that is left, and what folds, on networks with one peculiarity each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import nets
from tests.graph.conftest import folds, left, offered

X = nets.images(2, 3, 6, 6)


class TrainingNorm(nn.BatchNorm2d):
    """Normalises by the batch, whatever mode it is in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=True)


class WeightNormed(nn.Module):
    """A batch norm over the weight of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.bn(self.conv.weight.flatten(1).t()).t().view(4, 3, 3, 3)
        return F.conv2d(x, weight, self.conv.bias)


class Computed(nn.Module):
    """A convolution by a weight that is made of two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, self.a.weight + self.b.weight))


class Branches(nn.Module):
    """One branch that no input takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.unused, self.unused_bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.unused_bn(self.unused(x)) if x.shape[1] == 4 else self.bn(self.conv(x))


class Functional(nn.Module):
    """A norm by a function call, its statistics in a module that is no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.plain = nn.Module()
        self.plain.register_buffer("mean", torch.zeros(4))
        self.plain.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.plain.mean, self.plain.var)  # type: ignore[arg-type]


class Between(nn.Module):
    """conv -> a function -> bn."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.function(self.conv(x)))


def conv(norm: nn.Module, **options: Any) -> Any:
    return nets.chain(conv=nn.Conv2d(3, 4, 3, **options), bn=norm)


STAYS = {
    "training": (conv(TrainingNorm(4)), "batch-statistics"),
    "no statistics": (conv(nn.BatchNorm2d(4, track_running_stats=False)), "no-statistics"),
    "group norm": (conv(nn.GroupNorm(2, 4)), "batch-dependent"),
    "instance norm": (conv(nn.InstanceNorm2d(4)), "batch-dependent"),
    "on a weight": (WeightNormed(), "norm-on-weights"),
    "weight of two": (Computed(), "derived-weight"),
    "on the input": (nets.chain(bn=nn.BatchNorm2d(3)), "no-linear-producer"),
    "relu inside": (conv(nets.ReluNorm2d(4)), "not-affine"),
    "activation first": (conv(nets.ActFirstNorm2d(4, nn.ReLU())), "not-affine"),
}


@pytest.mark.parametrize("name", STAYS)
def test_a_norm_that_is_left(name: str) -> None:
    net, code = STAYS[name]
    assert left(net.eval(), X) == {"bn": code}


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (torch.relu, "aten.relu"),
        (lambda y: F.max_pool2d(y, 2), "aten.max_pool2d_with_indices"),
        (lambda y: y + y.mean(), "aten.add"),
        (lambda y: torch.cat([y[:, :2], y[:, 2:]], 1), "aten.cat"),
        (lambda y: y * 2, "aten.mul"),
    ],
    ids=["relu", "pool", "add", "cat", "mul"],
)
def test_the_op_that_feeds_a_norm_is_named(function: Any, op: str) -> None:
    (unfused,) = offered(nets.randomise(Between(function), 0), X).left
    assert (unfused.module, unfused.code) == ("bn", "no-linear-producer")
    assert f"{op} in the model's forward" in unfused.reason


def test_a_branch_that_no_input_takes() -> None:
    net = nets.randomise(Branches(), 0)
    assert folds(net, X) == [("conv", "bn")]
    assert left(net, X) == {"unused_bn": "not-executed"}


def test_a_norm_by_a_function_call() -> None:
    (unfused,) = offered(Functional().eval(), X).left
    assert (unfused.module, unfused.code) == ("(the model)", "functional-norm")


FOLDS = {
    "batch norm": nn.BatchNorm2d(4),
    "no affine": nn.BatchNorm2d(4, affine=False),
    "synchronised": nn.SyncBatchNorm(4),
    "instance norm": nn.InstanceNorm2d(4, track_running_stats=True),
    "frozen": nets.FrozenBatchNorm2d(4),
    "relu inside": nets.BatchNormAct2d(4, nn.ReLU()),
    "silu inside": nets.BatchNormAct2d(4, nn.SiLU()),
}


@pytest.mark.parametrize("name", FOLDS)
def test_a_norm_that_folds(name: str) -> None:
    net = conv(FOLDS[name], bias=False)
    assert folds(net, X) == [("conv", "bn")]
    assert left(net, X) == {}
