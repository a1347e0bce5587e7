"""A reason names what is in the way: the class of a norm, or what stands around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecli
from fusecli.outcome import Unfused
from tests.nets import ActFirstNorm2d, BatchNormAct2d, ReluNorm2d, StandardisedConv2d, images
from tests.proof.nets import conv, net

X = images(2, 3, 8, 8)


def act(channels: int) -> nn.Module:
    return BatchNormAct2d(channels, nn.LeakyReLU())


def left(wiring: Callable[[Any, Tensor], Tensor], norm: nn.Module, **modules: nn.Module) -> Unfused:
    model = net(wiring, bn=norm, **{"a": conv(), "b": conv(), **modules})
    (unfused,) = fusecli.plan(model, X).unfused
    return unfused


BEHIND = {
    "concatenation": (lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)), 6),
    "sum": (lambda m, x: m.bn(m.a(x) + m.b(x)), 3),
    "pooling": (lambda m, x: m.bn(F.avg_pool2d(m.a(x), 2)) + m.b(x).mean(), 3),
}


@pytest.mark.parametrize("case", BEHIND)
def test_a_class_that_keeps_its_promise_is_not_to_blame(case: str) -> None:
    wiring, channels = BEHIND[case]
    found = left(wiring, act(channels))
    assert found.code == "activation-inside"
    assert "bn (BatchNormAct2d) has an activation inside, LeakyReLU," in found.reason
    assert "extra_mappings" not in found.reason + found.remedy


@pytest.mark.parametrize("case", BEHIND)
def test_the_same_class_with_nothing_inside_folds_there(case: str) -> None:
    wiring, channels = BEHIND[case]
    model = net(wiring, bn=BatchNormAct2d(channels, nn.Identity()), a=conv(), b=conv())
    assert not fusecli.plan(model, X).unfused


@pytest.mark.parametrize("case", BEHIND)
def test_a_class_that_breaks_its_promise_is_to_blame(case: str) -> None:
    wiring, channels = BEHIND[case]
    for norm in (ActFirstNorm2d(channels, nn.LeakyReLU()), ReluNorm2d(channels)):
        found = left(wiring, norm)
        assert found.code == "not-affine"
        assert "extra_mappings" in found.remedy


AROUND = {
    "an_activation": (lambda m, x: m.bn(m.a(x).relu()) + m.b(x), "no-linear-producer", "aten.relu"),
    "the_input": (lambda m, x: m.bn(x).relu() + m.b(m.a(x)), "no-linear-producer", "input 0"),
    "another_reader": (
        lambda m, x: m.bn(y := m.a(x)) + y + m.b(x),
        "multiple-consumers",
        "not the only one to read",
    ),
}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, ReluNorm2d, act], ids=["plain", "hidden", "inside"])
@pytest.mark.parametrize("case", AROUND)
def test_what_stands_around_a_norm_is_told_whatever_its_class(case: str, norm: Any) -> None:
    """To teach the class would be in vain."""
    wiring, code, said = AROUND[case]
    found = left(wiring, norm(3))
    assert found.code == code
    assert said in found.reason
    assert "extra_mappings" not in found.remedy


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.bn(m.a(x)) + m.b(x),
        lambda m, x: m.a(m.bn(x)) + m.b(m.a(x)),
        lambda m, x: m.a(x) + m.bn(x),
    ],
    ids=["behind_a_layer", "before_a_layer", "identity_branch"],
)
def test_where_another_class_would_fold_the_class_is_told(wiring: Any) -> None:
    model = net(wiring, bn=ReluNorm2d(3), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1))
    (found,) = fusecli.plan(model, X).unfused
    assert found.code == "not-affine"


def test_a_layer_that_breaks_its_promise_is_blamed_alone() -> None:
    found = left(
        lambda m, x: m.bn(m.layer(x)) + m.b(m.a(x)).mean(), act(3), layer=StandardisedConv2d(3, 3, 3)
    )
    assert found.code == "not-linear-in-weight"
    assert "StandardisedConv2d computes" in found.reason
    assert "BatchNormAct2d" not in found.reason


def test_a_group_that_is_asked_for_gets_the_same_reason() -> None:
    wiring, channels = BEHIND["concatenation"]
    model = net(wiring, bn=act(channels), a=conv(), b=conv())
    outcome = fusecli.fuse(model, X, groups=[["a", "b", "bn"]])
    assert [no.code for no in outcome.refused] == ["activation-inside"]
