"""The lines that an int8 model has to reach, and which of them it misses, in sentences."""

from __future__ import annotations

from dataclasses import dataclass

from fusecli.int8.comparison import Comparison
from fusecli.plain import some


@dataclass(frozen=True)
class Threshold:
    """What the int8 model has to reach; None: not asked. `accuracy_drop` is in points of 100.

    whole  sqnr and cosine are asked of the output as a whole, and not of its worst channel
    """

    sqnr: float | None = None
    cosine: float | None = None
    top1: float | None = None
    accuracy_drop: float | None = None
    whole: bool = False

    @property
    def asks(self) -> bool:
        return self != Threshold(whole=self.whole)


def shortfalls(
    threshold: Threshold, comparison: Comparison, accuracies: tuple[float, float] | None
) -> list[str]:
    """One sentence for each line that is missed or cannot be judged; what equals its line passes.

    accuracies: shares of the float and of the int8 model, None without labels.
    """
    found = []
    none, sign = (
        "the output has no floating tensor",
        "a row of the output is one number, whose cosine is its sign",
    )
    for what, unit, got, line, why in (
        ("the SQNR", " dB", comparison.sqnr, threshold.sqnr, none),
        ("the cosine", "", comparison.cosine, threshold.cosine, none if comparison.sqnr is None else sign),
        ("the top-1 agreement", "", comparison.top1, threshold.top1, "the output is no [n, classes]"),
    ):
        if line is not None and got is None:
            found.append(f"{what} cannot be judged: {why}")
        elif line is not None and got is not None and not got >= line:
            found.append(_below(f"{what} of the output", got, line, unit))
    return [
        *found,
        *([] if threshold.whole else _channel_shortfalls(threshold, comparison)),
        *_accuracy_shortfall(threshold.accuracy_drop, accuracies),
    ]


def _channel_shortfalls(threshold: Threshold, comparison: Comparison) -> list[str]:
    """What the worst channel misses: in the mean of all, a large one hides it."""
    found = []
    for what, unit, worst, line in (
        ("the SQNR", " dB", comparison.channel_sqnr, threshold.sqnr),
        ("the cosine", "", comparison.channel_cosine, threshold.cosine),
    ):
        if worst is not None and line is not None and not worst.value >= line:
            found.append(_below(f"{what} of {worst.place}", worst.value, line, unit))
    if comparison.lost and (threshold.sqnr is not None or threshold.cosine is not None):
        found.append(f"one number in int8, though it varies in float: {some(comparison.lost)}")
    return found


def _below(what: str, got: float, line: float, unit: str) -> str:
    have, asked = _told_apart(got, line)
    return f"{what} is {have}{unit}, at least {asked}{unit} was asked for"


def _accuracy_shortfall(most: float | None, accuracies: tuple[float, float] | None) -> list[str]:
    if most is None:
        return []
    if accuracies is None:
        return ["the drop of the accuracy cannot be judged: there are no labels"]
    # 100 * (0.92 - 0.91) is 1.0000000000000009 in float64, and equal passes.
    drop = round(100 * (accuracies[0] - accuracies[1]), 9)
    if drop <= most:
        return []
    have, asked = _told_apart(drop, most)
    return [f"the accuracy drop in points is {have}, at most {asked} was asked for"]


def _told_apart(got: float, line: float) -> tuple[str, str]:
    """The line as it was asked for, and the number with as few digits as show that it differs."""
    asked = f"{line:g}" if float(f"{line:g}") == line else repr(line)
    pairs = ((f"{got:.{digits}g}", f"{line:.{digits}g}") for digits in (4, 8, 17))
    return next(have for have, other in pairs if have != other), asked
