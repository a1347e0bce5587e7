from __future__ import annotations

import math

import pytest

from fusecli.int8.comparison import Comparison
from fusecli.int8.threshold import Threshold, shortfalls

INF, NAN = math.inf, math.nan
MEASURED = Comparison((), 20.0, 0.99, 0.9, 0.95, 4)


@pytest.mark.parametrize(
    "threshold",
    [
        Threshold(),
        Threshold(20.0, 0.99, 0.95, 1.0),
        Threshold(sqnr=19.0),
        Threshold(sqnr=-INF),
        Threshold(accuracy_drop=1.0),  # 100 * (0.92 - 0.91) is above 1.0 in float64
    ],
)
def test_what_equals_its_line_passes(threshold: Threshold):
    assert shortfalls(threshold, MEASURED, (0.92, 0.91)) == []


def test_a_gain_in_accuracy_is_no_drop():
    assert shortfalls(Threshold(accuracy_drop=0.0), MEASURED, (0.9, 0.95)) == []


def test_one_sentence_for_each_missed_line():
    assert shortfalls(Threshold(30.0, 0.999, 0.99, 0.5), MEASURED, (0.92, 0.91)) == [
        "the SQNR of the output is 20 dB, at least 30 dB was asked for",
        "the cosine of the output is 0.99, at least 0.999 was asked for",
        "the top-1 agreement of the output is 0.95, at least 0.99 was asked for",
        "the accuracy drop in points is 1, at most 0.5 was asked for",
    ]


def test_numbers_that_differ_look_different():
    (sentence,) = shortfalls(Threshold(sqnr=20.000001), MEASURED, None)
    assert sentence == "the SQNR of the output is 20 dB, at least 20.000001 dB was asked for"
    (sentence,) = shortfalls(Threshold(cosine=math.nextafter(0.99, 1)), MEASURED, None)
    assert "0.98999999999999999, at least 0.9900000000000001" in sentence


def test_what_cannot_be_judged_is_a_shortfall():
    nothing = Comparison((), None, None, None, None, 1)
    assert shortfalls(Threshold(1.0, 0.5, 0.5, 1.0), nothing, None) == [
        "the SQNR cannot be judged: the output has no floating tensor",
        "the cosine cannot be judged: the output has no floating tensor",
        "the top-1 agreement cannot be judged: the output is no [n, classes]",
        "the drop of the accuracy cannot be judged: there are no labels",
    ]


def test_the_worst_numbers_miss_every_line():
    worst = Comparison((), -INF, -1.0, -1.0, 0.0, 1)
    assert len(shortfalls(Threshold(-100.0, 0.0, 0.1), worst, None)) == 3
    assert len(shortfalls(Threshold(accuracy_drop=5.0), worst, (0.9, NAN))) == 1


def test_asks():
    assert not Threshold().asks
    assert Threshold(accuracy_drop=0.0).asks
