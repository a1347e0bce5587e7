"""Which group breaks the whole, where each of them is right by itself? Found by halving the list."""

from __future__ import annotations

from collections.abc import Callable


def culprit(groups: int, differs: Callable[[int], bool]) -> int | None:
    """A group (counted from 0) whose fold makes the difference: without it and those behind it the model is
    right, with it wrong. None where the model is right with all of them fused.

    differs(n) says whether the model is wrong with the first n groups fused.
    """
    if not differs(groups):
        return None
    right, wrong = 0, groups
    while wrong - right > 1:
        middle = (right + wrong) // 2
        right, wrong = (right, middle) if differs(middle) else (middle, wrong)
    return wrong - 1
