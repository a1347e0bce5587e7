from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from fusecli.errors import ExitCode
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
point = nn.Conv2d
ROWS = nets.images(4, 8)


def added(m: Any, x: Tensor) -> Any:
    return relu(m.a(x) + m.b(x))


def pair(a: nn.Module, b: nn.Module) -> Any:
    return net(added, a=a, b=b)


def wired(wiring: Any, **modules: Any) -> Any:
    return net(wiring, **{"a": conv(), "b": conv(), **modules})


def tied() -> Any:
    model = wired(added)
    model.b.weight = model.a.weight
    return model


def partial_sum_read(m: Any, x: Tensor) -> Any:
    two = m.a(x) + m.b(x)
    return (two + m.c(x)) * two


def in_place(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y += m.b(x)
    return y


def up(kernel: int, **attributes: Any) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(3, 3, kernel, **attributes)


REFUSED: dict[str, tuple[Any, str]] = {
    "strides": (pair(conv(stride=2), nn.Conv2d(3, 3, 5, padding=2, stride=2)), ""),
    "different strides": (pair(nn.Conv2d(3, 3, 8), nn.Conv2d(3, 3, 8, stride=2)), "different-stride"),
    "dilation": (pair(conv(), nn.Conv2d(3, 3, 3, padding=2, dilation=2)), "different-dilation"),
    "groups": (pair(conv(), conv(groups=3)), "different-groups"),
    "no common centre": (pair(nn.Conv2d(3, 3, 3, stride=2), nn.Conv2d(3, 3, 4, stride=2)), "not-aligned"),
    "padding modes": (pair(conv(), conv(padding_mode="reflect")), "different-padding-mode"),
    "output padding": (
        pair(up(3, stride=2, padding=1, output_padding=1), up(2, stride=2)), "different-output-padding"),
    "one is transposed": (pair(up(1), nn.Conv2d(3, 3, 1)), "transposed-mix"),
    "pads in its forward": (pair(nets.SamePadConv2d(3, 3, 3), nn.Conv2d(3, 3, 1)), "not-aligned"),
    "both do": (pair(nets.SamePadConv2d(3, 3, 3), nets.SamePadConv2d(3, 3, 3)), "not-linear-in-weight"),
    "standardised": (pair(conv(), nets.StandardisedConv2d(3, 3, 1)), "not-linear-in-weight"),
    "tied": (tied(), "tied-weights"),
    "alpha": (wired(lambda m, x: torch.add(m.a(x), m.b(x), alpha=2)), "no-rule"),
    "a difference": (wired(lambda m, x: m.a(x) - m.b(x)), "no-rule"),
    "a product": (wired(lambda m, x: m.a(x) * m.b(x)), "no-rule"),
    "an activation between": (wired(lambda m, x: m.a(x) + relu(m.b(x))), "no-rule"),
    "another reader": (wired(lambda m, x: m.a(x) + (y := m.b(x)) + y.mean()), "no-rule"),
    "the output": (wired(lambda m, x: (m.a(x) + (y := m.b(x)), y)), "no-rule"),
    "two inputs": (wired(lambda m, x: m.a(x) + m.b(relu(x))), "no-rule"),
    "broadcast": (wired(added, a=nn.Conv2d(3, 3, 8)), "no-rule"),
    "a constant between": (wired(lambda m, x: (m.a(x) + 1) + m.b(x)), "no-rule"),
    "called twice": (wired(lambda m, x: m.a(x) + m.b(x) + m.b(-x)), "no-rule"),
    "a sum by another op": (wired(lambda m, x: torch.stack([m.a(x), m.b(x)]).sum(0)), "no-rule"),
    "forward looks at a shape": (wired(lambda m, x: m.a(x) + (y := m.b(x)).view(y.shape)), "no-rule"),
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in REFUSED if case != "strides"])
def test_refused(case: str) -> None:
    x = X
    model, code = REFUSED[case]
    if case == "no common centre":
        x = nets.images(2, 3, 8, 8)
    assert refusal(model, x, ["a", "b"]) == code
    assert left(model, x) == ""


def test_equal_strides_are_fine() -> None:
    folded(REFUSED["strides"][0], X, "parallel_layers", "a b")


def test_a_partial_sum_that_is_read() -> None:
    """Were b and c silent and all three in a, the product would be that of twice the whole sum."""
    assert [g.modules for g in fused(wired(partial_sum_read, c=conv()), X).groups] == [("a", "b")]


def test_one_layer_added_to_itself() -> None:
    left(net(lambda m, x: m.a(x) + m.a(x), a=conv()), X)


def test_a_silent_branch_breaks_a_forward_that_asks_it_for_a_shape() -> None:
    """That no run shows: the proof does, and what nobody asked for is dropped."""
    model = wired(lambda m, x: (y := m.b(x), (m.a(x) + y) * y.shape[2])[1])
    assert fusecli.fuse(model, X, discover=True).exit_code == ExitCode.NOTHING
    assert fusecli.fuse(model, X, groups=[["a", "b"]]).model is None


SHAPES: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "3x3 and 1x1": (conv(), point(3, 3, 1, bias=False), (2, 3, 8, 8)),
    "1x1 and 3x3": (point(3, 3, 1), conv(bias=False), (2, 3, 8, 8)),
    "1x3 and 3x1": (
        nn.Conv2d(3, 3, (1, 3), padding=(0, 1)), nn.Conv2d(3, 3, (3, 1), padding=(1, 0)), (2, 3, 8, 7)),
    "7x7 and 3x3, depthwise": (
        nn.Conv2d(4, 4, 7, padding=3, groups=4), nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 9, 9)),
    "groups and stride": (
        nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), nn.Conv2d(4, 6, 1, stride=2, groups=2),
        (2, 4, 9, 8)),
    "dilated, and a single tap": (
        nn.Conv2d(3, 3, 3, padding=2, dilation=2), point(3, 3, 1), (2, 3, 8, 8)),
    "reflected, and a single tap": (conv(padding_mode="reflect"), point(3, 3, 1), (2, 3, 8, 8)),
    "same padding of an even kernel": (nn.Conv2d(3, 3, 2, padding="same"), conv(), (2, 3, 8, 8)),
    "conv1d": (nn.Conv1d(3, 4, 5, padding=2), nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9)),
    "conv3d": (nn.Conv3d(2, 3, 3, padding=1), nn.Conv3d(2, 3, 1), (2, 2, 4, 5, 3)),
    "transposed": (up(3, padding=1), up(1, bias=False), (2, 3, 5, 5)),
    "transposed, strided": (up(4, stride=2, padding=1), up(2, stride=2), (2, 3, 5, 5)),
    "linear": (nn.Linear(8, 4, bias=False), nn.Linear(8, 4), (5, 8)),
    "linear, tokens": (nn.Linear(8, 4), nn.Linear(8, 4, bias=False), (2, 3, 8)),
    "no bias": (conv(bias=False), point(3, 3, 1, bias=False), (2, 3, 8, 8)),
    "subclasses": (PlainConv2d(3, 3, 3, padding=1), PlainConv2d(3, 3, 3, padding=1), (2, 3, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case: str) -> None:
    a, b, shape = SHAPES[case]
    model = pair(a, b)
    once = folded(model, nets.images(*shape), "parallel_layers", "a b")
    assert sorted(classes(once, "a", "b")) == sorted([type(a).__name__, "Zero"])
    assert len(once.state_dict()) == (1 if a.bias is None and b.bias is None else 2)


def test_the_kernel_that_is_too_small_grows() -> None:
    once = fused(pair(point(3, 4, 1), conv(3, 4)), X).model
    (layer,) = [module for module in (once.a, once.b) if isinstance(module, nn.Conv2d)]
    assert (layer.kernel_size, layer.padding, layer.weight.shape) == ((3, 3), (1, 1), (4, 3, 3, 3))


WIRINGS: dict[str, tuple[Any, str]] = {
    "three": (lambda m, x: m.a(x) + m.b(x) + m.c(x), "a b c"),
    "nested": (lambda m, x: m.a(x) + (m.b(x) + m.c(x)), "a b c"),
    "sum() starts at 0": (lambda m, x: sum([m.a(x), m.b(x), m.c(x)]), "a b c"),
    "in place": (in_place, "a b"),
    "a sum that two read": (lambda m, x: (y := m.a(x) + m.b(x)).mean() + relu(y), "a b"),
    "a dropout behind a branch": (lambda m, x: m.a(x) + m.drop(m.b(x)), "a b"),
    "something else is added": (lambda m, x: (m.a(x) + relu(x)) + m.b(x), "a b"),
    "the input is added": (lambda m, x: m.a(x) + x + m.b(x), "a b"),
}


@pytest.mark.parametrize("case", WIRINGS)
def test_wirings(case: str) -> None:
    wiring, names = WIRINGS[case]
    parts: dict[str, Any] = {name: conv() for name in names.split()}
    folded(net(wiring, **parts, drop=nn.Dropout()), X, "parallel_layers", names)


def test_what_is_added_to_in_place_stays() -> None:
    once = fused(net(in_place, a=point(3, 3, 1), b=conv()), X).model
    assert classes(once, "a", "b") == ["Conv2d", "Zero"]
    once = fused(wired(lambda m, x: m.a(x) + m.b(x).add_(relu(x))), X).model
    assert classes(once, "a", "b") == ["Zero", "Conv2d"]


def test_behind_a_norm_of_its_own_each() -> None:
    wiring = lambda m, x: relu(m.n(m.a(x)) + m.k(m.b(x)))  # noqa: E731
    once = fused(net(wiring, a=conv(), n=bn(), b=point(3, 3, 1), k=bn()), X).model
    assert classes(once, "a", "n", "b", "k").count("Conv2d") == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(dtype: torch.dtype) -> None:
    assert_rounded_once(pair(conv(), point(3, 3, 1)), X, dtype)


def test_hooks_are_lost_and_said_to_be() -> None:
    calls: list[str] = []
    outcome = fused(hooked(hooked(pair(conv(), point(3, 3, 1)), "a", calls), "b", calls), X)
    calls.clear()
    outcome.model(X)
    assert calls == ["a takes"]
    assert sorted(lost_hooks(outcome)) == ["a", "b", "b"]
