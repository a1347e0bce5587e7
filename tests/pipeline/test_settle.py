"""What is left out on the way, and what is not: the loop of every fuse and every plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from fusecli.engine import Group
from fusecli.outcome import Refusal
from fusecli.pipeline.fold import Fold, Refused
from fusecli.pipeline.select import Selection, record_and_select
from fusecli.pipeline.settle import settle
from fusecli.sample import Sample
from fusecli.source.resolve import in_memory
from fusecli.spec import Spec
from tests.nets import images, randomise

X = images(2, 3, 9, 9)
A, B, C = (("0", "1"), ("2", "3"), ("4", "5"))


def selection(*asked: tuple[str, ...], discover: bool = True) -> Selection:
    """Three convolutions with their norms; `asked` are those of the spec."""
    layers = (layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)))
    spec = Spec().model_copy(update={"discover": discover})
    source = in_memory(randomise(nn.Sequential(*layers), 0).eval(), spec)
    return record_and_select(spec, source, source.structure(), Sample((X,)), [Group(g) for g in asked])


def refusal(group: tuple[str, ...]) -> Refusal:
    return Refusal(group, "dropped", "it is wrong")


class Attempts:
    """Finds some groups wrong, or cannot make them; remembers what it was given."""

    def __init__(self, wrong: Sequence[tuple[str, ...]] = (), unmade: Sequence[tuple[str, ...]] = ()) -> None:
        self.wrong, self.unmade = wrong, unmade
        self.seen: list[list[tuple[str, ...]]] = []

    def __call__(self, _: Selection, fold: Fold) -> tuple[int, list[Refusal]]:
        groups = [decision.group.modules for decision in fold.decisions]
        self.seen.append(groups)
        if unmade := [refusal(group) for group in self.unmade if group in groups]:
            raise Refused(unmade)
        return len(self.seen), [refusal(group) for group in self.wrong if group in groups]


@pytest.mark.parametrize("how", ["wrong", "unmade"])
def test_what_nobody_asked_for_is_left_out(how: str) -> None:
    attempts = Attempts(**{how: [B]})
    settled = settle(selection(), attempts)
    assert attempts.seen == [[A, B, C], [A, C]]
    assert settled.made == 2
    assert [*settled.selection.dropped] == [B]
    assert settled.fold is not None
    assert [decision.group.modules for decision in settled.fold.decisions] == [A, C]


def test_what_was_asked_for_and_cannot_be_made_ends_it() -> None:
    attempts = Attempts(unmade=[A, B])
    settled = settle(selection(B), attempts)
    assert len(attempts.seen) == 1
    assert (settled.fold, settled.made) == (None, None)
    assert [no.group for no in settled.refused] == [A, B]


def test_what_was_asked_for_and_is_wrong_stays() -> None:
    """The verdict on all of it is what is told."""
    attempts = Attempts(wrong=[B])
    settled = settle(selection(B), attempts)
    assert (len(attempts.seen), settled.made, settled.selection.dropped) == (1, 1, {})
    assert settled.fold is not None
    assert len(settled.fold.decisions) == 3


def test_to_keep_going_is_to_leave_out_what_is_wrong() -> None:
    attempts = Attempts(wrong=[B])
    settled = settle(replace(selection(A, B, C), keep_going=True), attempts)
    assert attempts.seen == [[A, B, C], [A, C]]
    assert settled.selection.fell_short
    # But what cannot be made is refused, unless something was left out already.
    first = settle(replace(selection(A, B, C), keep_going=True), Attempts(unmade=[B]))
    assert (first.fold, [no.group for no in first.refused]) == (None, [B])
    later = settle(replace(settled.selection, keep_going=True), Attempts(unmade=[C]))
    assert later.fold is not None
    assert [*later.selection.dropped] == [B, C]


def test_what_is_left_out_in_the_end_is_nothing_to_attempt() -> None:
    attempts = Attempts(wrong=[A, B, C])
    settled = settle(selection(), attempts)
    assert attempts.seen == [[A, B, C]]
    assert settled.made is None
    assert settled.fold is not None
    assert settled.fold.decisions == ()


def test_a_selection_is_not_changed_by_what_is_left_out() -> None:
    whole = selection()
    part = whole.without([refusal(B)])
    assert [group.modules for group in whole.groups] == [A, B, C]
    assert [group.modules for group in part.groups] == [A, C]
    assert whole.dropped == {}
    with pytest.raises(AttributeError):
        whole.taking = False  # type: ignore[misc]  # that is the point
    # Of a norm that is left out the account says why.
    left: Any = {norm.module: norm.code for norm in part.unfused()}
    assert left["3"] == "dropped"
