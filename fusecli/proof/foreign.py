"""Two models and nothing known of how one became the other: outputs are all there is to compare.

The fused weights were rounded once, so float64 outputs differ by what that rounding does. How much that is,
is measured: the fused model's weights are moved by half a unit in their last place, several times. Each leaf
and each channel is held against what that does to it, whatever the size of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.blame import described, forward_failed
from fusecli.errors import UsageError
from fusecli.graph.followers import widened
from fusecli.graph.materialise import duplicate
from fusecli.outcome import ASKED, Judgement, LedgerEntry, Verdict
from fusecli.plain import some
from fusecli.proof.compare import (
    TOLERANCE,
    Difference,
    Incomparable,
    Pair,
    compare,
    floating_error,
    leaves,
)
from fusecli.proof.gaps import Gaps, Line, lines
from fusecli.proof.noise import drifts, narrowest, noise_of_neighbours
from fusecli.proof.power import largest, move
from fusecli.proof.reading import Reading
from fusecli.proof.run import float64_arithmetic, run
from fusecli.proof.sizes import at_other_sizes
from fusecli.sample import Sample, seeded

_DRAWS = 4
_MOST_DRAWS = 16
_MARGIN = 10.0  # the largest of a few draws is not the largest there is


def judge_foreign(original: nn.Module, fused: nn.Module, sample: Sample, seed: int) -> Verdict:
    """The verdict on end-to-end outputs alone; what they cannot show is inconclusive.

    Raises UsageError where the original model cannot be run on the sample at all.
    """
    try:
        return _judged(original, fused, sample, seed)
    except Incomparable as odd:
        return Verdict(Judgement.INCONCLUSIVE, seed=seed, reasons=(str(odd),))
    except _Fails as fails:
        judgement = Judgement.DIFFERENT if fails.at_all else Judgement.INCONCLUSIVE
        where = "" if fails.at_all else " in float64"
        return Verdict(judgement, seed=seed, reasons=(f"the fused model does not run{where}: {fails}",))


class _Fails(Exception):
    """A model does not run: not `at_all`, or only not in float64."""

    def __init__(self, cause: Exception, *, at_all: bool) -> None:
        super().__init__(described(cause))
        self.cause = cause
        self.at_all = at_all


@dataclass(frozen=True)
class AsRun:
    """Both models as users run them: in the stored dtype, without modes, hooks or gradients; torch may take a
    fast path only there. `reason` says how they differ, "" where they do not or nobody can tell."""

    said: str
    reason: str = ""


@dataclass(frozen=True)
class _Seen:
    """What the runs showed, each leaf of the output by itself.

    again   of the original against itself
    broken  how the fused output differs in anything but numbers
    shaky   the same, where half a unit in the last place of the weights is enough for it
    lines   what each leaf is held against
    blind   leaves of numbers that depend on the weights and do not notice 1 % of error in them
    unread  the parameters that no operation read
    """

    again: Difference
    broken: Sequence[str]
    shaky: Sequence[str]
    lines: Sequence[Line]
    blind: Sequence[str]
    unread: Sequence[str]
    as_run: AsRun

    @property
    def worst(self) -> tuple[float, float]:
        """The relative error that is the most times its tolerance, and that tolerance."""
        nearest = max(self.lines, key=lambda line: line.excess, default=None)
        error, tolerance = nearest.relative if nearest else (0.0, TOLERANCE)
        return (math.inf if self.broken or self.shaky else error), tolerance

    @property
    def turned_by_tolerance(self) -> bool:
        """Whether with a tolerance of the error itself the verdict would be `equivalent`."""
        doubtful = self.broken or self.shaky or self.blind or self.unread or self.as_run.reason
        wrong = [line for line in self.lines if line.excess > 1]
        return not doubtful and self.again.error <= TOLERANCE and all(line.acceptable for line in wrong)

    def judged(self) -> tuple[Judgement, str]:
        if self.again.undefined:
            return Judgement.INCONCLUSIVE, f"the original model returns NaN at {self.again.where}"
        if self.again.error > TOLERANCE:
            return Judgement.INCONCLUSIVE, "the original model disagrees with itself on the same input"
        if self.broken:
            return Judgement.DIFFERENT, self.broken[0]
        if wrong := [line for line in self.lines if line.excess > 1]:
            return Judgement.DIFFERENT, _said(max(wrong, key=lambda line: line.excess))
        if self.as_run.reason:
            return Judgement.DIFFERENT, self.as_run.reason
        if self.shaky:
            return Judgement.INCONCLUSIVE, f"{self.shaky[0]}, which the rounding of the weights decides"
        if not any(line.notices for line in self.lines):
            return Judgement.INCONCLUSIVE, "the outputs do not notice weights that are off by 1 %"
        if self.blind:
            return Judgement.INCONCLUSIVE, f"{self.blind[0]} does not notice weights that are off by 1 %"
        if self.unread:
            return Judgement.INCONCLUSIVE, f"the inputs never reach {some(self.unread)}"
        return Judgement.EQUIVALENT, ""


def _said(line: Line) -> str:
    where, axis = line.place
    if axis < 0 and not float(line.size.max()):
        return f"{int(line.gap.max())} integers of {where} differ"
    error, _ = line.relative
    if not math.isfinite(error):
        return f"NaN or Inf at {where}, which the original has not"
    return f"{where} has a relative error of {error:.1e} in float64"


def _judged(original: nn.Module, fused: nn.Module, sample: Sample, seed: int) -> Verdict:
    a, b = widened(original), widened(fused)
    try:
        reference = _answer(a, original, sample, seed)
    except _Fails as fails:
        if fails.at_all:
            raise UsageError(forward_failed(fails.cause)) from fails
        raise Incomparable(f"the original model does not run in float64: {fails}") from fails
    again = compare(reference, run(a, sample, seed=seed + 1_000_003, dtype=torch.float64))
    with Reading() as reading:
        output = _answer(b, fused, sample, seed)
    asked = tuple(reading.asked)
    moved = _Moved(b, fused, sample, seed, torch.Generator().manual_seed(seed))
    difference, off = Gaps.between(reference, output), moved(_one_percent)
    rounding, found = _lines((reference, output, off), difference, moved)
    shaky = {path for path in difference.broken if any(path in drawn.broken for drawn in rounding)}
    seen = _Seen(
        again=again,
        broken=[why for path, why in difference.broken.items() if path not in shaky],
        shaky=[difference.broken[path] for path in shaky],
        lines=found,
        blind=_blind(output, found, moved),
        unread=[name for name, parameter in b.named_parameters() if id(parameter) not in reading.read],
        as_run=_as_run(original, fused, sample, seed),
    )
    judgement, reason = seen.judged()
    error, tolerance = seen.worst
    turns = judgement is Judgement.EQUIVALENT or seen.turned_by_tolerance
    checks = {
        "semantic": f"outputs differ by {error:.1e} in float64",
        "rounding": f"{tolerance:.1e} is what the rounding of the weights may do there",
        "drift": seen.as_run.said,
        "power": f"1 % of error in the weights moves them by {compare(output, off).error:.1e}",
    }
    if judgement is Judgement.EQUIVALENT:
        rounded = max(compare(output, moved.rounded()).error for _ in range(_DRAWS))
        line = max(TOLERANCE, _MARGIN * rounded)
        shown = at_other_sizes(sample, (), lambda other: _differs(a, b, other, seed, line))
        checks["sizes"] = shown.sentence
        if shown.wrong is not None:
            name, _, worst = shown.wrong
            said = worst.why or f"relative error {worst.error:.1e} in float64"
            judgement, reason = Judgement.DIFFERENT, f"equal at {shown.at}, but not at {name}: {said}"
            turns = False
    return Verdict(
        judgement=judgement,
        float64_error=error,
        tolerance=tolerance,
        smallest_tolerance=error if turns else None,
        end_to_end=True,
        samples=1,
        seed=seed,
        checks=checks,
        reasons=(reason,) if reason else (),
        ledger=tuple(LedgerEntry("assumed", line, ASKED) for line in asked),
    )


def _differs(a: nn.Module, b: nn.Module, sample: Sample, seed: int, line: float) -> Difference | None:
    """Whether the float64 twins differ on this sample; None where the original does not run on it."""
    try:
        reference = run(a, sample, seed=seed, dtype=torch.float64)
    except Exception:  # whatever somebody's forward may raise: it takes no such input
        return None
    try:
        found = compare(reference, run(b, sample, seed=seed, dtype=torch.float64))
    except Incomparable:
        return None
    except Exception as error:
        return Difference(math.inf, "output", f"the fused model raises {type(error).__name__}: {error}")
    if found.undefined:
        return None
    return found if found.error > line else Difference()


def _as_run(original: nn.Module, fused: nn.Module, sample: Sample, seed: int) -> AsRun:
    """Held against each other, by what a unit in the last place of either's weights does to it."""
    dtype = narrowest([*original.parameters(), *fused.parameters()])
    try:
        first, second = run(original, sample, seed=seed), run(fused, sample, seed=seed)
    except Exception as no:  # e.g. two dtypes, or an op that this CPU build has not got in float16
        return AsRun(f"not run in the stored dtype, {dtype}: {type(no).__name__}: {no}")
    error = floating_error(first, second)
    if error is None or error != error:
        return AsRun("the outputs hold no numbers in the stored dtype")
    noise = torch.finfo(dtype).eps
    if drifts(error, noise, dtype):
        moved = ((original, first), (fused, second))
        noise = max(noise, *(noise_of_neighbours(model, sample, own, seed) for model, own in moved))
    last = f"a unit in the last place of the weights moves them by {noise:.1e}"
    said = f"as users run them they differ by {error:.1e}; {last}"
    if not drifts(error, noise, dtype):
        return AsRun(said)
    return AsRun(
        said,
        f"they agree in float64, but as users run them, without hooks and modes, they differ by {error:.1e}: "
        "torch takes a fast path there",
    )


def _lines(outputs: tuple[Any, Any, Any], difference: Gaps, moved: _Moved) -> tuple[list[Gaps], list[Line]]:
    """What the rounding of the weights does, and what each leaf is held against; `outputs` as for `lines`."""
    _, output, off = outputs
    power = Gaps.between(output, off)
    rounding: list[Gaps] = []
    while True:
        rounding += [Gaps.between(output, moved.rounded()) for _ in range(_DRAWS)]
        found = list(lines(outputs, difference, rounding, power, _MARGIN))
        # Of thousands of channels a few lie still in each of a few draws, and so may an argmax.
        near = (line.excess for line in found if not math.isfinite(line.excess) or line.excess <= _MARGIN)
        if len(rounding) >= _MOST_DRAWS or max(near, default=0.0) <= 1:
            return rounding, found


def _blind(output: Any, found: Sequence[Line], moved: _Moved) -> list[str]:
    """Leaves of numbers that show nothing of the weights, though they depend on them."""
    noticing = {line.place[0] for line in found if line.notices}
    numbers = Gaps.between(output, output).numbers
    blind = sorted({line.place[0] for line in found if line.place[0] in numbers - noticing})
    if not blind:
        return []
    try:
        free = moved.without_gradient() & moved.without_effect(output)
    except Exception:  # what a forward raises with other weights, or with gradients
        return blind
    return [path for path in blind if path not in free]


def _answer(twin: nn.Module, stored: nn.Module, sample: Sample, seed: int) -> Any:
    """What `twin` returns; raises _Fails with whether `stored`, as it is, does not run either."""
    try:
        return run(twin, sample, seed=seed, dtype=torch.float64)
    except Exception as error:  # whatever somebody's forward may raise
        try:
            run(stored, sample, seed=seed)
        except Exception as plain:
            raise _Fails(plain, at_all=True) from plain
        raise _Fails(error, at_all=False) from error


@dataclass(frozen=True)
class _Moved:
    """Called with a step, what `twin` returns once each of its parameters has made it."""

    twin: nn.Module
    stored: nn.Module
    sample: Sample
    seed: int
    generator: torch.Generator

    def __call__(self, step: Callable[[Tensor, Tensor, torch.dtype], None]) -> Any:
        moved = duplicate(self.twin)
        for parameter, original in zip(moved.parameters(), self.stored.parameters(), strict=True):
            if parameter.is_floating_point():
                step(parameter.data, self._uniform(*parameter.shape).to(parameter.device), original.dtype)
        return run(moved, self.sample, seed=self.seed, dtype=torch.float64)

    def rounded(self) -> Any:
        """With every number off by up to half a unit in its last place, and as much again for all those of an
        output together: the scale that a fold multiplies them with is rounded too."""

        def step(weight: Tensor, uniform: Tensor, dtype: torch.dtype) -> None:
            if weight.ndim > 1:
                alike = self._uniform(len(weight), *(1,) * (weight.ndim - 1))
                uniform = uniform + alike.to(weight.device)
            weight.mul_(1 + uniform * (torch.finfo(dtype).eps / 2))

        return self(step)

    def _uniform(self, *shape: int) -> Tensor:
        """Between -1 and 1."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * 2 - 1

    def without_gradient(self) -> set[str]:
        """The leaves that no gradient leads to from any parameter."""
        twin, inputs = duplicate(self.twin), self.sample.copy(torch.float64)
        for parameter in twin.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        with seeded(self.seed), torch.enable_grad(), float64_arithmetic():
            output = twin(*inputs.args, **inputs.kwargs)
        pairs = (leaf for leaf in leaves(output, output) if isinstance(leaf, Pair))
        return {leaf.at for leaf in pairs if not leaf.a.requires_grad}

    def without_effect(self, output: Any) -> set[str]:
        """The leaves of `output` that are the same with any other weights."""
        other = Gaps.between(output, self(_anything))
        moved = {path for (path, _), gap in other.channels.items() if bool((gap > 0).any())}
        return {path for path, _ in other.channels} - moved


def _one_percent(weight: Tensor, uniform: Tensor, _: torch.dtype) -> None:
    move(weight, uniform, largest(weight) or _usual(weight))


def _anything(weight: Tensor, uniform: Tensor, _: torch.dtype) -> None:
    weight.mul_(3 * uniform).add_(uniform * _usual(weight))


def _usual(weight: Tensor) -> float:
    """The size of a number in a tensor of this shape, where its own numbers do not tell."""
    return (len(weight) / weight.numel()) ** 0.5 if weight.ndim and weight.numel() else 1.0
