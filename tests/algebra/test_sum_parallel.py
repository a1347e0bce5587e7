from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from fusecli.algebra import LinearOp, sum_parallel
from fusecli.errors import NotFoldable
from tests.algebra.grid import CASES, CONV, CONV_TRANSPOSE, GROUPED_LINEAR, Case, close, each, lift, random

PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "3 and 1": ({"kernel_size": 3, "padding": 1}, {"kernel_size": 1}),
    "5 and 3": ({"kernel_size": 5, "padding": 2}, {"kernel_size": 3, "padding": 1}),
    "5 and 3, unpadded by as much": ({"kernel_size": 5, "padding": 1}, {"kernel_size": 3, "padding": 0}),
    "dilated": (
        {"kernel_size": 5, "padding": 4, "dilation": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
    ),
    "dilated and 1": ({"kernel_size": 3, "padding": 2, "dilation": 2}, {"kernel_size": 1}),
}


def pair(kind: Any, left: dict[str, Any], right: dict[str, Any], **both: Any) -> tuple[LinearOp, LinearOp]:
    torch.manual_seed(1)
    return lift(kind(4, 6, **left, **both).double()), lift(kind(4, 6, **right, **both).double())


@each(CASES)
def test_law_of_two_alike(case: Case) -> None:
    a, x = case.op, case.x
    b = LinearOp(a.weight.flip(0, 1, 2), random(a.out_channels), a.geometry)
    assert close(sum_parallel(a, b)(x), a(x) + b(x))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("sizes", PAIRS)
@pytest.mark.parametrize(("groups", "stride"), [*product((1, 2), (1, 2))])
@pytest.mark.parametrize(("of_a", "of_b"), [*product((True, False), (True, False))])
def test_law_of_kernels_that_differ(
    rank: int, sizes: str, groups: int, stride: int, of_a: bool, of_b: bool
) -> None:
    left, right = PAIRS[sizes]
    options = {"groups": groups, "stride": stride}
    a, b = pair(CONV[rank], left | {"bias": of_a}, right | {"bias": of_b}, **options)
    x = random(2, 4, *(8, 9, 7)[:rank])
    for total in (sum_parallel(a, b), sum_parallel(b, a)):
        assert total.kernel == a.kernel
        assert (total.bias is not None) == (of_a or of_b)
        assert close(total(x), a(x) + b(x))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("sizes", PAIRS)
@pytest.mark.parametrize(("stride", "extra"), [(1, 0), (2, 0), (2, 1)])
def test_law_of_transposed_kernels_that_differ(rank: int, sizes: str, stride: int, extra: int) -> None:
    a, b = pair(CONV_TRANSPOSE[rank], *PAIRS[sizes], stride=stride, output_padding=extra, groups=2)
    x = random(2, 4, *(5, 4, 6)[:rank])
    for total in (sum_parallel(a, b), sum_parallel(b, a)):
        assert close(total(x), a(x) + b(x))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_law_of_an_unpadded_layer_beside_any_padding_mode(mode: str) -> None:
    a, b = pair(nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": mode}, {"kernel_size": 1})
    x = random(2, 4, 5, 6)
    for total in (sum_parallel(a, b), sum_parallel(b, a)):
        assert total.geometry.padding_mode == mode
        assert close(total(x), a(x) + b(x))


def test_law_of_kernels_each_larger_on_one_axis() -> None:
    tall, wide = {"kernel_size": (3, 1), "padding": (1, 0)}, {"kernel_size": (1, 5), "padding": (0, 2)}
    a, b = pair(nn.Conv2d, tall, wide)
    x = random(2, 4, 5, 6)
    assert sum_parallel(a, b).kernel == (3, 5)
    assert close(sum_parallel(a, b)(x), a(x) + b(x))


def test_law_of_an_even_kernel_beside_an_odd_one() -> None:
    a, b = pair(nn.Conv2d, {"kernel_size": 2, "padding": "same"}, {"kernel_size": 3, "padding": "same"})
    x = random(2, 4, 5, 6)
    assert close(sum_parallel(a, b)(x), a(x) + b(x))


def test_law_of_rank_0() -> None:
    other, x = LinearOp(random(2, 3, 4) - 1, None, GROUPED_LINEAR.geometry), random(5, 8)
    assert close(sum_parallel(GROUPED_LINEAR, other)(x), GROUPED_LINEAR(x) + other(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_is_rounded_once_to_the_dtype_asked_for(dtype: torch.dtype) -> None:
    a, b = pair(nn.Conv2d, {"kernel_size": 3}, {"kernel_size": 3})
    total = sum_parallel(a, b, dtype)
    assert total.bias is not None
    assert total.bias.dtype == dtype
    assert torch.equal(total.weight, (a.weight + b.weight).to(dtype))


# One entry per refusal that a layer of the left's geometry would answer wrongly.
WRONG = {
    "not-aligned": ({"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 0}),
    "different-stride": ({"kernel_size": 3, "stride": 1}, {"kernel_size": 3, "stride": 2}),
    "different-dilation": (
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1},
    ),
    "different-padding-mode": (
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ),
}


@pytest.mark.parametrize("code", WRONG)
def test_what_does_not_add_up_is_refused_and_would_be_wrong(code: str) -> None:
    a, b = pair(nn.Conv2d, *WRONG[code])
    for left, right in ((a, b), (b, a)):
        with pytest.raises(NotFoldable) as refusal:
            sum_parallel(left, right)
        assert refusal.value.code == code
    x = random(2, 4, 7, 7)
    assert a.bias is not None
    assert b.bias is not None
    anyway = LinearOp(a.weight + b.weight, a.bias + b.bias, a.geometry)
    of_a, of_b = a(x), b(x)
    assert of_a.shape != of_b.shape or (anyway(x) - of_a - of_b).abs().max() > 0.01


@pytest.mark.parametrize(
    ("left", "right"),
    [
        # Equally long outputs, but the small kernel sits off the centre by one.
        ({"kernel_size": 4, "padding": "same"}, {"kernel_size": 2, "padding": 0, "dilation": 3}),
        # The shift of one is no whole number of dilated taps.
        (
            {"kernel_size": 3, "padding": 2, "dilation": 2},
            {"kernel_size": 2, "padding": "same", "dilation": 2},
        ),
        ({"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "padding": 1}),
    ],
    ids=str,
)
def test_kernels_that_share_no_centre_are_refused(left: dict[str, Any], right: dict[str, Any]) -> None:
    a, b = pair(nn.Conv1d, left, right)
    with pytest.raises(NotFoldable) as refusal:
        sum_parallel(a, b)
    assert refusal.value.code in ("not-aligned", "different-dilation")


def test_an_off_centre_kernel_placed_in_the_centre_would_be_wrong() -> None:
    a, b = pair(nn.Conv1d, {"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "padding": 1})
    x = random(2, 4, 7)
    centred = nn.functional.pad(b.weight, (1, 1))
    anyway = LinearOp(a.weight + centred, None, a.geometry)(x)
    assert a(x).shape != b(x).shape
    assert anyway.shape != b(x).shape


def test_different_output_padding_is_refused_and_would_be_wrong() -> None:
    options = {"kernel_size": 3, "stride": 2}
    a, b = pair(nn.ConvTranspose1d, options, options | {"output_padding": 1})
    with pytest.raises(NotFoldable) as refusal:
        sum_parallel(a, b)
    assert refusal.value.code == "different-output-padding"
    x = random(2, 4, 7)
    assert a(x).shape != b(x).shape


def test_a_transposed_beside_a_plain_conv_is_refused_and_would_be_wrong() -> None:
    plain = lift(nn.Conv1d(4, 6, 3, padding=1).double())
    mirrored = lift(nn.ConvTranspose1d(4, 6, 3, padding=1).double())
    with pytest.raises(NotFoldable) as refusal:
        sum_parallel(plain, mirrored)
    assert refusal.value.code == "transposed-mix"
    x = random(2, 4, 7)
    anyway = LinearOp(plain.weight + mirrored.weight, plain.bias + mirrored.bias, plain.geometry)
    assert (anyway(x) - plain(x) - mirrored(x)).abs().max() > 0.01


def test_different_groups_are_refused_for_no_layer_of_either_kind_is_the_sum() -> None:
    a, b = lift(nn.Conv1d(4, 6, 1, groups=2).double()), lift(nn.Conv1d(4, 6, 1).double())
    with pytest.raises(NotFoldable) as refusal:
        sum_parallel(a, b)
    assert refusal.value.code == "different-groups"
    x, nudged = torch.zeros(1, 4, 3, dtype=torch.float64), torch.zeros(1, 4, 3, dtype=torch.float64)
    nudged[:, 3] = 1
    # Output 0 is in group 0 of `a` and must not see input 3, of group 1; in the sum it does.
    assert torch.equal(a(x)[:, 0], a(nudged)[:, 0])
    assert not torch.equal((a(x) + b(x))[:, 0], (a(nudged) + b(nudged))[:, 0])


@pytest.mark.parametrize(
    "other", [nn.Conv1d(5, 6, 1), nn.Conv1d(4, 5, 1), nn.Conv2d(4, 6, 1), nn.Linear(4, 6)], ids=repr
)
def test_other_channels_or_rank_are_refused(other: nn.Module) -> None:
    with pytest.raises(NotFoldable) as refusal:
        sum_parallel(lift(nn.Conv1d(4, 6, 1)), lift(other))
    assert refusal.value.code == "shape"
