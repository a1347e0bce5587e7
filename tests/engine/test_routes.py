"""Which ops a norm may be folded across: what joins, parts, averages and moves channels; and what not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecli
from tests import nets
from tests.proof.nets import X, bn, conv, net
from tests.rules.side_by_side import relative_error
from tests.rules.wired import folded, fused, left, refusal

relu, cat = torch.relu, torch.cat
Wiring = Callable[..., Any]


def up(outputs: int = 3, **attributes: Any) -> nn.Conv2d:
    """From 3 channels to this many."""
    return nn.Conv2d(3, outputs, 3, padding=1, **attributes)


def across(op: Callable[[Tensor], Tensor], norm: nn.Module | None = None, outputs: int = 3) -> Any:
    """A convolution, something, a norm."""
    return net(lambda m, x: relu(m.bn(op(m.a(x)))), a=up(outputs), bn=norm or bn(outputs))


def shuffled(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


FOLDED: dict[str, Any] = {
    "avg_pool": across(lambda y: F.avg_pool2d(y, 2)),
    "avg_pool, ceil": across(lambda y: F.avg_pool2d(y, 3, ceil_mode=True)),
    "avg_pool, padding that is not counted": across(
        lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False)
    ),
    "adaptive_avg_pool": across(lambda y: F.adaptive_avg_pool2d(y, 3)),
    "adaptive_avg_pool to 1": across(lambda y: F.adaptive_avg_pool2d(y, 1)),
    "mean": across(lambda y: y.mean((2, 3)), nn.BatchNorm1d(3)),
    "mean, kept": across(lambda y: y.mean((2, 3), keepdim=True)),
    "nearest": across(lambda y: F.interpolate(y, scale_factor=2)),
    "bilinear": across(lambda y: F.interpolate(y, scale_factor=2, mode="bilinear")),
    "bilinear, corners": across(lambda y: F.interpolate(y, size=(7, 5), mode="bilinear", align_corners=True)),
    "reflection": across(lambda y: F.pad(y, (1, 2, 1, 0), mode="reflect")),
    "replication": across(lambda y: F.pad(y, (1, 1, 1, 1), mode="replicate")),
    "pixel_shuffle": across(lambda y: F.pixel_shuffle(y, 2), bn(3), 12),
    "channel shuffle by views": across(shuffled, outputs=6),
    "channel_shuffle": across(lambda y: F.channel_shuffle(y, 3), outputs=6),
    "flip": across(lambda y: y.flip(1)),
    "roll": across(lambda y: y.roll(2, 1)),
    "a crop": across(lambda y: y[:, :, 1:, :-1]),
    "some of the channels": across(lambda y: y[:, 1:4], bn(3), 5),
    "spatial axes turned around": across(lambda y: y.permute(0, 1, 3, 2)),
    "spatial axes made one": across(lambda y: y.flatten(2), nn.BatchNorm1d(3)),
    "dropout": across(lambda y: F.dropout2d(y, training=False)),
}


@pytest.mark.parametrize("case", FOLDED)
def test_across(case: str) -> None:
    folded(FOLDED[case], X, "conv_bn", "a bn")


LEFT: dict[str, Any] = {
    "relu": across(relu),
    "max_pool": across(lambda y: F.max_pool2d(y, 2)),
    "adaptive_max_pool": across(lambda y: F.adaptive_max_pool2d(y, 3)),
    "padding that is counted": across(lambda y: F.avg_pool2d(y, 3, 2, 1)),
    "another divisor": across(lambda y: F.avg_pool2d(y, 2, divisor_override=3)),
    "a sum": across(lambda y: y.sum((2, 3), keepdim=True)),
    "bicubic": across(lambda y: F.interpolate(y, scale_factor=2, mode="bicubic")),
    "zeros around": across(lambda y: F.pad(y, (1, 1, 1, 1))),
    "a mean over channels": across(lambda y: y.mean(1, keepdim=True), bn(1)),
    "channels made one": across(lambda y: y.flatten(1), nn.BatchNorm1d(192)),
    "channels on another axis": across(lambda y: y.permute(0, 2, 1, 3), bn(8)),
    "channels twice": across(lambda y: y[:, [0, 0, 1]]),
    "pixel_unshuffle": across(lambda y: F.pixel_unshuffle(y, 2), bn(12)),
    "pixels of one channel in several": across(lambda y: y.reshape(2, 6, 8, 4), bn(6)),
    "a softmax": across(lambda y: y.softmax(1)),
    "a literal added": across(lambda y: y + 1),
}


@pytest.mark.parametrize("case", LEFT)
def test_not_across(case: str) -> None:
    assert left(LEFT[case], X) in ("no-linear-producer", "bn-axis", "not-adjacent")
    refusal(LEFT[case], X, ["a", "bn"])


def test_a_linear_layer_whose_features_are_turned_to_the_front() -> None:
    model = net(lambda m, x: relu(m.bn(m.a(x).transpose(1, 2))), a=nn.Linear(8, 5), bn=nn.BatchNorm1d(5))
    folded(model, nets.images(2, 7, 8), "linear_bn", "a bn")


JOINED: dict[str, tuple[Wiring, dict[str, int], int]] = {
    # wiring, the outputs of each convolution, the channels of the norm
    "two": (lambda m, x: cat([m.a(x), m.b(x)], 1), {"a": 3, "b": 2}, 5),
    "three": (lambda m, x: cat([m.a(x), m.b(x), m.c(x)], 1), {"a": 1, "b": 2, "c": 3}, 6),
    "nested": (
        lambda m, x: cat([m.a(x), F.avg_pool2d(cat([m.b(x), m.c(x)], 1), 1)], 1),
        {"a": 1, "b": 2, "c": 3},
        6,
    ),
    "on another axis": (lambda m, x: cat([m.a(x), m.b(x)], 2), {"a": 3, "b": 3}, 3),
    "the same twice, on another axis": (lambda m, x: cat([y := m.a(x), y], 3), {"a": 3}, 3),
    "pooled branches": (
        lambda m, x: cat([F.avg_pool2d(m.a(x), 2), m.b(x[:, :, ::2, ::2])], 1),
        {"a": 2, "b": 2},
        4,
    ),
}


@pytest.mark.parametrize("case", JOINED)
def test_a_cat_of_layers(case: str) -> None:
    wiring, layers, channels = JOINED[case]
    parts: dict[str, Any] = {name: up(outputs) for name, outputs in layers.items()}
    model = net(lambda m, x: relu(m.bn(wiring(m, x))), **parts, bn=bn(channels))
    folded(model, X, "conv_bn", " ".join([*layers, "bn"]))


UNJOINED: dict[str, tuple[Wiring, int]] = {
    "the same twice": (lambda m, x: cat([y := m.a(x), y], 1), 6),
    "the input beside it": (lambda m, x: cat([m.a(x), x], 1), 6),
    "an activation on one": (lambda m, x: cat([m.a(x), relu(m.b(x))], 1), 6),
    "zeros beside it": (lambda m, x: cat([m.a(x), torch.zeros_like(x)], 1), 6),
    "another reader of one": (lambda m, x: cat([y := m.a(x), m.b(x)], 1) + y.mean(), 6),
}


@pytest.mark.parametrize("case", UNJOINED)
def test_a_cat_that_stays(case: str) -> None:
    wiring, channels = UNJOINED[case]
    model = net(lambda m, x: relu(m.bn(wiring(m, x))), a=up(), b=up(), bn=bn(channels))
    left(model, X)
    refusal(model, X, ["a", "b", "bn"])


def test_a_dense_block_where_a_norm_reads_what_another_has_read() -> None:
    """The second norm would change what the first reads."""

    def dense(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        return relu(m.k(cat([y, m.b(relu(m.n(y)))], 1)))

    model = net(dense, a=up(), n=bn(), b=up(), k=bn(6))
    proposal = fusecli.plan(model, X)
    assert (proposal.groups, {norm.module for norm in proposal.unfused}) == ((), {"n", "k"})


def halves(sizes: list[int]) -> Wiring:
    def wiring(m: Any, x: Tensor) -> Any:
        first, second = m.a(x).split(sizes, 1)
        return cat([relu(m.n(first)), relu(m.k(second))], 1)

    return wiring


PARTED: dict[str, tuple[Wiring, int, int]] = {
    # wiring, channels of the two norms; the convolution has 6
    "split": (halves([2, 4]), 2, 4),
    "chunk": (lambda m, x: relu(m.n((y := m.a(x).chunk(2, 1))[0])) * relu(m.k(y[1])), 3, 3),
    "slices": (lambda m, x: relu(m.n((y := m.a(x))[:, :3])) * relu(m.k(y[:, 3:])), 3, 3),
    "every second": (lambda m, x: relu(m.n((y := m.a(x))[:, ::2])) * relu(m.k(y[:, 1::2])), 3, 3),
    "and pooled": (
        lambda m, x: relu(m.n(F.avg_pool2d((y := m.a(x))[:, :2], 2))).mean() + relu(m.k(y[:, 2:])),
        2,
        4,
    ),
}


@pytest.mark.parametrize("case", PARTED)
def test_norms_that_share_a_layer(case: str) -> None:
    wiring, first, second = PARTED[case]
    folded(net(wiring, a=up(6), n=bn(first), k=bn(second)), X, "conv_bn", "a n k")


def test_a_norm_of_some_channels_where_others_go_elsewhere() -> None:
    wiring = lambda m, x: cat([m.n((y := m.a(x))[:, :3]), relu(y[:, 3:])], 1)  # noqa: E731
    once = folded(net(wiring, a=up(6), n=bn()), X, "conv_bn", "a n")
    model = net(wiring, a=up(6), n=bn())
    assert torch.equal(once.a.weight[3:], model.a.weight[3:])
    assert torch.equal(once.a.bias[3:], model.a.bias[3:])


OVERLAPPING: dict[str, Wiring] = {
    "two norms": lambda m, x: m.n((y := m.a(x))[:, :4]).mean() + m.k(y[:, 3:]),
    "an activation": lambda m, x: m.n((y := m.a(x))[:, :4]).mean() + relu(y[:, 3:]),
    "parts of the image": lambda m, x: m.k((y := m.a(x))[:, :3, 4:]).mean() + relu(y[:, :3, :4]),
    "all of it": lambda m, x: m.k((y := m.a(x))[:, :3]).mean() + y,
}


@pytest.mark.parametrize("case", OVERLAPPING)
def test_overlapping_readers(case: str) -> None:
    model = net(OVERLAPPING[case], a=up(6), n=bn(4), k=bn(3))
    assert fusecli.plan(model, X).groups == ()


def sum_of(wiring: Wiring, **parts: Any) -> Any:
    """Branches that read different tensors, so that they cannot become one layer; a norm behind the sum."""
    return net(lambda m, x: relu(m.bn(wiring(m, x))), **{"a": up(), "b": up(), "bn": bn(), **parts})


ADDED: dict[str, tuple[Wiring, str]] = {
    "two": (lambda m, x: m.a(x) + m.b(-x), "a b"),
    "nested": (lambda m, x: m.a(x) + (m.b(-x) + m.c(relu(x))), "a b c"),
    "in place": (lambda m, x: m.a(x).add_(m.b(-x)), "a b"),
    "broadcast": (lambda m, x: m.a(x) + m.b(-x).mean((2, 3), keepdim=True), "a b"),
    "pooled behind": (lambda m, x: F.avg_pool2d(m.a(x) + m.b(-x), 2), "a b"),
    "a cat of sums": (lambda m, x: m.a(x) + cat([m.c(-x), m.b(-x)[:, :1]], 1), ""),
}


@pytest.mark.parametrize("case", [case for case in ADDED if case != "a cat of sums"])
def test_the_scale_goes_into_all_the_shift_into_one(case: str) -> None:
    wiring, names = ADDED[case]
    parts: dict[str, Any] = {"c": up()} if "c" in names else {}
    model = sum_of(wiring, **parts)
    once = folded(model, X, "conv_bn", f"{names} bn")
    scale = model.bn.weight / (model.bn.running_var + model.bn.eps).sqrt()
    shift = model.bn.bias - model.bn.running_mean * scale
    # The first branch takes the shift.
    for name in names.split():
        layer = getattr(model, name)
        bias = layer.bias * scale + (shift if name == "a" else 0)
        assert torch.allclose(getattr(once, name).bias, bias, atol=1e-5), name
        weight = layer.weight * scale[:, None, None, None]
        assert torch.allclose(getattr(once, name).weight, weight, atol=1e-5)


def test_a_branch_that_only_scales_needs_no_bias() -> None:
    once = fused(sum_of(ADDED["two"][0], a=up(bias=False), b=up(bias=False)), X).model
    assert list(once.state_dict()) == ["a.weight", "a.bias", "b.weight"]


def test_some_channels_of_a_branch_are_no_whole_branch() -> None:
    wiring = ADDED["a cat of sums"][0]
    folded(sum_of(wiring, c=up(2)), X, "conv_bn", "a c b bn")


UNADDED: dict[str, Wiring] = {
    "twice the same": lambda m, x: (y := m.a(x)) + y,
    "the input": lambda m, x: m.a(x) + x,
    "alpha": lambda m, x: torch.add(m.a(x), m.b(-x), alpha=2),
    "a difference": lambda m, x: m.a(x) - m.b(-x),
    "an activation on one": lambda m, x: m.a(x) + relu(m.b(-x)),
    "a product": lambda m, x: m.a(x) * m.b(-x),
    "a branch that is read elsewhere": lambda m, x: m.a(x) + (y := m.b(-x)) + relu(y),
}


@pytest.mark.parametrize("case", UNADDED)
def test_a_sum_that_stays(case: str) -> None:
    left(sum_of(UNADDED[case]), X)


def test_a_norm_that_is_called_twice() -> None:
    """Behind one layer each time, and each layer behind it alone."""
    wiring = lambda m, x: m.bn(F.avg_pool2d(m.a(x), 2)) * m.bn(F.avg_pool2d(m.b(x), 2)).sigmoid()  # noqa: E731
    once = folded(net(wiring, a=up(), b=up(), bn=bn()), X, "conv_bn", "a bn b")
    assert isinstance(once.bn, nn.Identity)


def test_a_layer_that_is_called_twice() -> None:
    pooled = lambda m, x: F.avg_pool2d(m.a(x), 2)  # noqa: E731
    both = net(lambda m, x: m.bn(pooled(m, x)) * m.bn(pooled(m, -x)), a=up(), bn=bn())
    folded(both, X, "conv_bn", "a bn")
    once = net(lambda m, x: m.bn(pooled(m, x)) * pooled(m, -x), a=up(), bn=bn())
    left(once, X)
    assert refusal(once, X, ["a", "bn"]) in ("shared-module", "not-adjacent")
    others = net(lambda m, x: m.bn(pooled(m, x)) * m.k(pooled(m, -x)), a=up(), bn=bn(), k=bn())
    left(others, X)


def test_two_norms_that_read_one_tensor() -> None:
    """Both would change it for the other."""
    left(net(lambda m, x: relu(m.bn(y := m.a(x))) * relu(m.k(y)), a=up(), bn=bn(), k=bn()), X)


def test_a_model_in_train_mode() -> None:
    model = net(lambda m, x: relu(m.bn(cat([m.a(x), m.drop(m.b(x))], 1))), a=up(), b=up(2), bn=bn(5),
                drop=nn.Dropout())  # fmt: skip
    evaluated = model(X)
    once = folded(model.train(), X, "conv_bn", "a b bn")
    assert model.training
    assert relative_error(once.eval()(X), evaluated.double()) < 1e-6


def test_a_fold_opens_the_way_for_the_next() -> None:
    """Behind the first norm the second is as near to the layers as the first was."""
    wiring = lambda m, x: relu(m.k(F.avg_pool2d(m.n(cat([m.a(x), m.b(x)], 1)), 2)))  # noqa: E731
    once = fused(net(wiring, a=up(), b=up(2), n=bn(5), k=bn(5)), X).model
    assert all(isinstance(module, nn.Identity) for module in (once.n, once.k))


def test_every_module_is_used_once_by_a_chain_of_blocks() -> None:
    """A small network of all of it: nothing with statistics is left, and it is the same function."""

    def wiring(m: Any, x: Tensor) -> Any:
        y = relu(m.n1(cat([m.a(x), m.b(x)], 1)))
        one, two = m.c(y).split([3, 3], 1)
        z = F.avg_pool2d(cat([m.n2(one), m.n3(two)], 1), 2)
        return m.head(m.n4(z).flatten(1))

    model = net(
        wiring,
        a=up(2),
        b=up(4),
        n1=bn(6),
        c=conv(6, 6),
        n2=bn(3),
        n3=bn(3),
        n4=bn(6),
        head=nn.Linear(96, 2),
    )
    once = fused(model, X).model
    assert not [name for name in once.state_dict() if "running" in name]
