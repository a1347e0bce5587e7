"""The cases that a quick run draws of the grid."""

from __future__ import annotations

from tests.algebra.grid import CASES, covering, pairs_of


def test_every_two_choices_meet_in_a_quick_run() -> None:
    drawn = covering(CASES)
    met = set().union(*map(pairs_of, drawn))
    assert met == set().union(*map(pairs_of, CASES))
    assert len(drawn) < len(CASES) / 10
    assert {case.name for case in CASES if not case.choices} <= {case.name for case in drawn}


def test_the_same_cases_are_drawn_each_time() -> None:
    assert covering(CASES) == covering(CASES)
