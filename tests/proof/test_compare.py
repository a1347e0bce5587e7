from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
import torch

from fusecli.proof.compare import Difference, Incomparable, compare, floating_error
from fusecli.proof.trace import Trace

NAN, INF = math.nan, math.inf
T = torch.tensor


class Colour(Enum):
    RED = 1
    BLUE = 2


@dataclass
class Point:
    x: Any
    y: Any


EQUAL = [
    (T([1.0, INF, -INF]), T([1.0, INF, -INF])),
    (T([]), T([])),
    (T([0.0, -0.0]), T([-0.0, 0.0])),
    (T([1 + 2j]), T([1 + 2j])),
    (T([1, 2]), T([1, 2])),
    (T([True]), T([True])),
    (T([0.0, 1e-18], dtype=torch.float64), T([1e-18, 0.0], dtype=torch.float64)),  # zero but for rounding
    (T([1.5], dtype=torch.bfloat16), T([1.5], dtype=torch.float64)),
    (None, None),
    (0.1 + 0.2, 0.3),
    ("a", "a"),
    (Colour.RED, Colour.RED),
    ({"a": [(1, T(2.0))]}, {"a": [(1, T(2.0))]}),
    (Point(1, T(2.0)), Point(1, T(2.0))),
    (torch.eye(2).to_sparse(), torch.eye(2).to_sparse()),
    (frozenset({1}), frozenset({1})),
]
UNEQUAL = [
    (T([NAN]), T([NAN])),
    (T([1.0]), T([NAN])),
    (T([INF]), T([-INF])),
    (T([INF]), T([1.0])),
    (T([1.0]), T([INF])),
    (T([1.0]), T([[1.0]])),
    (T([]), T([1.0])),
    (T([1]), T([1.0])),
    (T([1]), T([2])),
    (T([1.0 + 0j]), T([1.0])),
    (T([0.0]), T([1e-3])),
    (T(1.0), 1.0),
    (1, 1.0),
    (1, True),
    (None, 0),
    ("a", "b"),
    (Colour.RED, Colour.BLUE),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({"a": 1}, {"a": 1, "b": 2}),
    ([1], (1,)),
    ([1, 2], [1]),
    (Point(1, 2), Point(1, 3)),
    ({1}, {2}),
]


@pytest.mark.parametrize(("a", "b"), EQUAL, ids=lambda value: repr(value)[:40])
def test_equal(a: Any, b: Any) -> None:
    assert compare(a, b).error < 1e-12


@pytest.mark.parametrize(("a", "b"), UNEQUAL, ids=lambda value: repr(value)[:40])
def test_unequal(a: Any, b: Any) -> None:
    assert compare(a, b).error == INF
    assert compare(a, b).why


def test_the_worst_leaf_is_named() -> None:
    difference = compare({"a": [T([2.0, 4.0]), T(1.0)]}, {"a": [T([2.0, 3.0]), T(1.1)]})
    assert (difference.error, difference.where) == (0.25, "output['a'][0]")


def test_python_numbers_keep_all_their_digits() -> None:
    assert compare(1.0, 1.0 + 1e-8).error == pytest.approx(1e-8, rel=1e-6)
    assert compare(1j, 1j + 1e-8).error == pytest.approx(1e-8, rel=1e-6)


def test_small_numbers_that_are_no_residue_count() -> None:
    small = T([1e-9, 0.0], dtype=torch.float64)
    assert compare(small, small * 1.5).error == pytest.approx(0.5)


def test_nan_of_the_original_is_told_from_nan_of_the_fused() -> None:
    assert compare(T([NAN]), T([1.0])).undefined
    assert not compare(T([1.0]), T([NAN])).undefined


@pytest.mark.parametrize("odd", [object(), print, slice(1), int, iter(())])
def test_unknown_objects_are_incomparable(odd: Any) -> None:
    with pytest.raises(Incomparable):
        compare([odd], [odd])


def test_what_holds_itself_is_incomparable() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(Incomparable):
        compare(loop, loop)


def test_floating_error_sees_no_integers_and_no_structure() -> None:
    assert floating_error((T([1]), T([1.0])), (T([2]), T([1.5]))) == 0.5
    assert floating_error((T([1]), "a"), (T([2]), "b")) is None
    assert floating_error(T([1.0]), T([NAN])) == INF


def test_a_trail_knows_single_elements_and_forgives_cancellation() -> None:
    a, b = [("add", (4,), 1.0, 0.25)], [("add", (4,), 1.0, 0.25 + 2e-6)]
    assert Trace(a).against(Trace(b)).error == pytest.approx(1e-6)
    large = [("sub", (4,), 1e12, 0.25)], [("sub", (4,), 1e12, 0.25 + 2e-6)]
    assert Trace(large[0]).against(Trace(large[1])).error < 1e-9
    left = (
        [("sub", (4,), 1.0, 0.0), ("abs", (4,), 1e-16, 2e-16)],
        [("sub", (4,), 1.0, 0.0), ("abs", (4,), 1e-16, 0.0)],
    )
    assert Trace(left[0]).against(Trace(left[1])).error < 1e-9
    zero = Trace([("relu", (4,), 0.0, 0.0)])
    assert zero.against(Trace([("relu", (4,), 1.0, 0.5)])).error > 1e-2
    assert Trace(a).against(Trace([("mul", (4,), 1.0, 9.0)])).error == 0.0


# Pairs of leaves: a plain error of 0.25, one of 1e-12 that has a `why`, the original's own NaN, a new NaN.
PLAIN = (T([1.0]), T([0.75]))
EXPLAINED = (T([2.0**-40], dtype=torch.float64), T([2.0**-40 * (1 + 1e-12)], dtype=torch.float64))
UNDEFINED = (T([NAN]), T([NAN]))
BROKEN = (T([1.0]), T([NAN]))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("leaves", "error", "undefined"),
    [
        ((PLAIN, EXPLAINED), 0.25, False),
        ((PLAIN, UNDEFINED), 0.25, False),
        ((UNDEFINED, EXPLAINED), INF, True),
        ((BROKEN, UNDEFINED), INF, False),
        ((BROKEN, PLAIN, EXPLAINED, UNDEFINED), INF, False),
    ],
)
def test_the_worst_is_kept_in_whatever_order_it_comes(
    leaves: Any, order: int, error: float, undefined: bool
) -> None:
    a, b = zip(*leaves[::order], strict=True)
    found = compare(a, b)
    assert (found.error, found.undefined) == (error, undefined)


def test_what_is_wrong_beside_a_nan_of_the_original_is_wrong() -> None:
    assert compare(T([NAN, 1.0]), T([NAN, 0.75])).error == 0.25
    assert not compare(T([NAN, 1.0]), T([NAN, 0.75])).undefined
    assert not compare(T([NAN, 1.0]), T([NAN, NAN])).undefined
    assert compare(T([NAN, 1.0]), T([NAN, 1.0])).undefined


def test_an_error_that_is_no_number_is_the_worst() -> None:
    assert Difference(NAN).error == INF
    assert Difference(0.5).worse(Difference(NAN)).error == INF


def test_constants_that_are_equal_in_both_hide_nothing() -> None:
    """The filling of a mask, huge or infinite, is no measure of what stands beside it."""
    for filling in (-1e9, -1e30, -INF):
        a, b = (T([filling, value, 3.0], dtype=torch.float64) for value in (1.0, 1.0 + 1e-4))
        assert compare(a, b).error > 1e-6


def test_a_channel_is_held_against_its_own_size() -> None:
    a = T([[1e3, 1e-1], [2e3, 2e-1]], dtype=torch.float64)
    b = a + T([[0.0, 1e-7], [0.0, 0.0]], dtype=torch.float64)
    assert compare(a, b, channels=True).error > 4e-7
    assert compare(a.T.reshape(1, 2, 2, 1), b.T.reshape(1, 2, 2, 1), channels=True).error > 4e-7
    # What is left where large numbers cancel is no channel of its own.
    assert compare(T([1.0, 1e-17]), T([1.0, 3e-17]), channels=True).error < 1e-9
    assert compare(T(1.0), T(2.0), channels=True).error == 1.0


@pytest.mark.parametrize("broken", [NAN, INF])
def test_a_trail_that_breaks_in_one_run_is_different(broken: float) -> None:
    sound = [("sqrt", (4,), 1.0, 0.25), ("mul", (4,), 1.0, 0.25)]
    other = [("sqrt", (4,), broken, NAN), ("mul", (4,), 1.0, 0.25)]
    assert Trace(sound).against(Trace(other)).error == INF
    # The original's own are nothing to be held against.
    assert Trace(other).against(Trace(other)).error == 0.0
