"""Two models and nothing known of how one became the other: outputs are all there is to compare.

The fused weights were rounded once, so float64 outputs differ by what that rounding does. How much that is,
is measured: the fused model's weights are moved by half a unit in their last place, several times.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.equivalence.compare import TOLERANCE, Difference, Incomparable, compare, floating_error
from fusecli.equivalence.noise import drifts, narrowest, noise_of_neighbours
from fusecli.equivalence.reading import Reading
from fusecli.equivalence.run import run
from fusecli.equivalence.sizes import at_other_sizes
from fusecli.errors import Problem, UsageError
from fusecli.graph.materialise import duplicate
from fusecli.outcome import ASKED, Judgement, LedgerEntry, Verdict
from fusecli.sample import Sample

_DRAWS = 4
_MARGIN = 10.0  # the largest of a few draws is not the largest there is
_PERTURBATION = 0.01


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

    def __init__(self, message: str, *, at_all: bool) -> None:
        super().__init__(message)
        self.at_all = at_all


@dataclass(frozen=True)
class AsRun:
    """Both models as users run them: in the stored dtype, without modes, hooks or gradients; torch may take a
    fast path only there. `reason` says how they differ, "" where they do not or nobody can tell."""

    said: str
    reason: str = ""


@dataclass(frozen=True)
class _Seen:
    """What the runs showed: relative errors, and the parameters that no operation read.

    again      of the original against itself
    rounding   of the fused model when its weights move by half a unit in the last place; `noticed`: by 1 %
    """

    difference: Difference
    again: Difference
    rounding: float
    noticed: float
    unread: list[str]
    as_run: AsRun

    @property
    def line(self) -> float:
        return max(TOLERANCE, _MARGIN * self.rounding)

    def judged(self) -> tuple[Judgement, str]:
        if self.again.undefined:
            return Judgement.INCONCLUSIVE, f"the original model returns NaN at {self.again.where}"
        if self.again.error > TOLERANCE:
            return Judgement.INCONCLUSIVE, "the original model disagrees with itself on the same input"
        if self.difference.error > self.line:
            error = f"relative error {self.difference.error:.1e} in float64"
            return Judgement.DIFFERENT, self.difference.why or error
        if self.as_run.reason:
            return Judgement.DIFFERENT, self.as_run.reason
        if self.noticed <= self.line:
            return Judgement.INCONCLUSIVE, "the outputs do not notice weights that are off by 1 %"
        if self.unread:
            more = f" and {len(self.unread) - 3} more" if len(self.unread) > 3 else ""
            return Judgement.INCONCLUSIVE, f"the inputs never reach {', '.join(self.unread[:3])}{more}"
        return Judgement.EQUIVALENT, ""


def _judged(original: nn.Module, fused: nn.Module, sample: Sample, seed: int) -> Verdict:
    a, b = duplicate(original).double(), duplicate(fused).double()
    try:
        reference = _answer(a, original, sample, seed)
    except _Fails as fails:
        if fails.at_all:
            fix = "give one entry per forward argument, with the shape and dtype it expects"
            raise UsageError(
                Problem(f"the model does not run on these inputs: {fails}", "inputs", fix)
            ) from fails
        raise Incomparable(f"the original model does not run in float64: {fails}") from fails
    again = compare(reference, run(a, sample, seed=seed + 1_000_003, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    with Reading() as reading:
        output = _answer(b, fused, sample, seed)
    asked = tuple(reading.asked)
    seen = _Seen(
        difference=compare(reference, output),
        again=again,
        rounding=max(_moved(b, fused, output, sample, seed, generator, _half_ulp) for _ in range(_DRAWS)),
        noticed=_moved(b, fused, output, sample, seed, generator, _one_percent),
        unread=[name for name, parameter in b.named_parameters() if id(parameter) not in reading.read],
        as_run=_as_run(original, fused, sample, seed),
    )
    judgement, reason = seen.judged()
    checks = {
        "semantic": f"outputs differ by {seen.difference.error:.1e} in float64",
        "rounding": f"half a unit in the last place of the weights moves them by {seen.rounding:.1e}",
        "drift": seen.as_run.said,
        "power": f"1 % of error in the weights moves them by {seen.noticed:.1e}",
    }
    if judgement is Judgement.EQUIVALENT:
        shown = at_other_sizes(sample, (), lambda other: _differs(a, b, other, seed, seen.line))
        checks["sizes"] = shown.sentence
        if shown.wrong is not None:
            name, _, worst = shown.wrong
            said = worst.why or f"relative error {worst.error:.1e} in float64"
            judgement, reason = Judgement.DIFFERENT, f"equal at {shown.at}, but not at {name}: {said}"
    error = seen.difference.error
    return Verdict(
        judgement=judgement,
        float64_error=error,
        tolerance=seen.line,
        smallest_tolerance=error if math.isfinite(error) else None,
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


def _answer(twin: nn.Module, stored: nn.Module, sample: Sample, seed: int) -> Any:
    """What `twin` returns; raises _Fails with whether `stored`, as it is, does not run either."""
    try:
        return run(twin, sample, seed=seed, dtype=torch.float64)
    except Exception as error:  # whatever somebody's forward may raise
        try:
            run(stored, sample, seed=seed)
        except Exception as plain:
            raise _Fails(f"{type(plain).__name__}: {plain}", at_all=True) from plain
        raise _Fails(f"{type(error).__name__}: {error}", at_all=False) from error


def _moved(
    twin: nn.Module,
    stored: nn.Module,
    output: object,
    sample: Sample,
    seed: int,
    generator: torch.Generator,
    step: Callable[[Tensor, torch.dtype], Tensor],
) -> float:
    """How far the output of `twin` moves when its parameters do."""
    moved = copy.deepcopy(twin)
    for parameter, original in zip(moved.parameters(), stored.parameters(), strict=True):
        if parameter.is_floating_point():
            uniform = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
            parameter.data.mul_(1 + step(uniform.to(parameter.device), original.dtype))
    return compare(output, run(moved, sample, seed=seed, dtype=torch.float64)).error


def _half_ulp(uniform: Tensor, dtype: torch.dtype) -> Tensor:
    return uniform * (torch.finfo(dtype).eps / 2)


def _one_percent(uniform: Tensor, _: torch.dtype) -> Tensor:
    return uniform * _PERTURBATION
