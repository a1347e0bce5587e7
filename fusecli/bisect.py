"""Which of many is at fault, found by halves: each question is a run of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

_T = TypeVar("_T")


def failing(items: Sequence[_T], holds: Callable[[Sequence[_T]], bool]) -> Iterator[_T]:
    """Those with which it does not hold, each by itself; the others hold together."""
    if not items or holds(items):
        return
    if len(items) == 1:
        yield items[0]
        return
    middle = len(items) // 2
    yield from failing(items[:middle], holds)
    yield from failing(items[middle:], holds)


def first_that_differs(count: int, differs: Callable[[int], bool]) -> int | None:
    """The one of `count` (counted from 0) that makes the difference: without it and those behind it nothing
    differs, with it something does. None where nothing differs with all of them.

    differs(n) says whether it does with the first n.
    """
    if not differs(count):
        return None
    right, wrong = 0, count
    while wrong - right > 1:
        middle = (right + wrong) // 2
        right, wrong = (right, middle) if differs(middle) else (middle, wrong)
    return wrong - 1
