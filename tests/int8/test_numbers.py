from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusecli.int8.numbers import accuracy, cosine, cosines, sqnr, top1

INF, NAN = math.inf, math.nan


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [
        (t(10.0, 0.0), t(10.0, 1.0), 20.0),  # 10 log10(100 / 1)
        (t(1.0, 2.0), t(2.0, 4.0), 0.0),  # 10 log10(5 / 5)
        (t(1.0), t(11.0), -20.0),
        (t(1.0, 2.0), t(1.0, 2.0), INF),
        (t(0.0, 0.0), t(0.0, 0.0), INF),
        (t(0.0, 0.0), t(0.0, 1e-3), -INF),
        (t(1.0, 2.0), t(1.0, NAN), -INF),
        (t(1.0, 2.0), t(1.0, INF), -INF),
        (t(1.0, INF), t(1.0, INF), -INF),
        (t(NAN), t(0.0), -INF),
        (torch.ones(0), torch.ones(0), INF),
    ],
)
def test_sqnr(reference: Tensor, other: Tensor, expected: float):
    assert sqnr(reference, other) == pytest.approx(expected)


def test_sqnr_is_summed_in_float64():
    reference = torch.full((1000,), 3e30)
    other = reference.clone()
    other[0] = 3e30 * (1 - 2.0**-10)
    # float32 would overflow: 10 log10(1000 * 2^20)
    assert sqnr(reference, other) == pytest.approx(10 * math.log10(1000 * 2**20), abs=1e-2)


@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [
        (t([3.0, 4.0], [1.0, 0.0]), t([6.0, 8.0], [0.0, 1.0]), [1.0, 0.0]),
        (t([1.0, 0.0]), t([1.0, 1.0]), [0.5**0.5]),
        (t([1.0, 0.0]), t([-2.0, 0.0]), [-1.0]),
        (t([0.0, 0.0], [0.0, 0.0]), t([0.0, 0.0], [1.0, 0.0]), [1.0, 0.0]),
        (t([1.0, 1.0], [1.0, 1.0]), t([0.0, 0.0], [NAN, 1.0]), [0.0, -1.0]),
        (t([1.0, INF]), t([1.0, INF]), [-1.0]),
        (t(3.0, 4.0), t(4.0, 3.0), [24 / 25]),  # one axis is no batch: the cosine of numbers is their sign
        (torch.tensor(2.0), torch.tensor(5.0), [1.0]),
        (t([[1.0], [2.0]], [[0.0], [1.0]]), t([[2.0], [4.0]], [[1.0], [1.0]]), [1.0, 0.5**0.5]),
    ],
)
def test_cosines(reference: Tensor, other: Tensor, expected: list[float]):
    found = cosines(reference, other)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected)


def test_cosine_of_equal_rows_is_exactly_one():
    x = torch.randn(100, 37)
    assert cosines(x, x.clone()).tolist() == [1.0] * 100


def test_cosine_is_the_mean_but_no_mean_hides_what_is_not_finite():
    assert cosine(t([1.0, 0.0], [1.0, 0.0]), t([2.0, 0.0], [0.0, 1.0])) == 0.5
    assert cosine(torch.ones(1000, 2), torch.ones(1000, 2).index_fill(0, torch.tensor(3), NAN)) == -1


@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [
        (t([1.0, 2.0], [5.0, 2.0]), t([0.0, 9.0], [2.0, 3.0]), 0.5),
        (t([1.0, 2.0, 0.0]), t([-3.0, -2.0, -9.0]), 1.0),
        (t([1.0, 1.0]), t([2.0, 2.0]), 1.0),  # of equal scores the first
        (t([1.0, 2.0], [1.0, 2.0]), t([1.0, NAN], [1.0, INF]), 0.0),
        (t([1.0, NAN]), t([1.0, NAN]), 0.0),
        (t([1.0], [2.0]), t([1.0], [2.0]), None),
        (t(1.0, 2.0), t(1.0, 2.0), None),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), None),
        (torch.ones(0, 3), torch.ones(0, 3), None),
    ],
)
def test_top1(reference: Tensor, other: Tensor, expected: float | None):
    assert top1(reference, other) == expected


def test_accuracy():
    scores = t([1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [1.0, NAN])
    assert accuracy(scores, torch.tensor([1, 1, 1, 1])) == 0.5
    with pytest.raises(ValueError, match=r"\[n, c\] and \[n\]"):
        accuracy(scores, torch.tensor([[1], [1], [1], [1]]))
    with pytest.raises(ValueError, match=r"\[n, c\] and \[n\]"):
        accuracy(torch.ones(0, 3), torch.ones(0, dtype=torch.long))


@pytest.mark.parametrize("number", [sqnr, cosine, cosines, top1])
def test_other_shapes_are_an_error_and_never_broadcast(number: Callable[[Tensor, Tensor], Any]):
    with pytest.raises(ValueError, match=r"\[2, 3\] cannot be compared with \[1, 3\]"):
        number(torch.ones(2, 3), torch.ones(1, 3))
