"""Two models and nothing known of how one became the other: outputs are all there is to compare.

The fused weights were rounded once, so float64 outputs differ by what that rounding does. How much that is,
is measured: the fused model's weights are moved by half a unit in their last place, several times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.blame import described, forward_failed
from fusecli.equivalence.compare import TOLERANCE, Difference, Incomparable, compare
from fusecli.equivalence.reading import Reading
from fusecli.equivalence.run import run
from fusecli.errors import UsageError
from fusecli.graph.followers import widened
from fusecli.graph.materialise import duplicate
from fusecli.outcome import Judgement, Verdict
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

    def __init__(self, cause: Exception, *, at_all: bool) -> None:
        super().__init__(described(cause))
        self.cause = cause
        self.at_all = at_all


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

    @property
    def line(self) -> float:
        return max(TOLERANCE, _MARGIN * self.rounding)

    @property
    def turned_by_tolerance(self) -> bool:
        """Whether with a tolerance of the error itself the verdict would be `equivalent`."""
        agrees = self.again.error <= TOLERANCE and not self.unread
        return (
            agrees
            and self.line < self.difference.error < self.noticed
            and math.isfinite(self.difference.error)
        )

    def judged(self) -> tuple[Judgement, str]:
        if self.again.undefined:
            return Judgement.INCONCLUSIVE, f"the original model returns NaN at {self.again.where}"
        if self.again.error > TOLERANCE:
            return Judgement.INCONCLUSIVE, "the original model disagrees with itself on the same input"
        if self.difference.error > self.line:
            error = f"relative error {self.difference.error:.1e} in float64"
            return Judgement.DIFFERENT, self.difference.why or error
        if self.noticed <= self.line:
            return Judgement.INCONCLUSIVE, "the outputs do not notice weights that are off by 1 %"
        if self.unread:
            more = f" and {len(self.unread) - 3} more" if len(self.unread) > 3 else ""
            return Judgement.INCONCLUSIVE, f"the inputs never reach {', '.join(self.unread[:3])}{more}"
        return Judgement.EQUIVALENT, ""


def _judged(original: nn.Module, fused: nn.Module, sample: Sample, seed: int) -> Verdict:
    a, b = widened(original), widened(fused)
    try:
        reference = _answer(a, original, sample, seed)
    except _Fails as fails:
        if fails.at_all:
            raise UsageError(forward_failed(fails.cause)) from fails
        raise Incomparable(f"the original model does not run in float64: {fails}") from fails
    again = compare(reference, run(a, sample, seed=seed + 1_000_003, dtype=torch.float64))
    generator = torch.Generator().manual_seed(seed)
    with Reading() as reading:
        output = _answer(b, fused, sample, seed)
    seen = _Seen(
        difference=compare(reference, output),
        again=again,
        rounding=max(_moved(b, fused, output, sample, seed, generator, _half_ulp) for _ in range(_DRAWS)),
        noticed=_moved(b, fused, output, sample, seed, generator, _one_percent),
        unread=[name for name, parameter in b.named_parameters() if id(parameter) not in reading.read],
    )
    judgement, reason = seen.judged()
    error = seen.difference.error
    turns = judgement is Judgement.EQUIVALENT or seen.turned_by_tolerance
    return Verdict(
        judgement=judgement,
        float64_error=error,
        tolerance=seen.line,
        smallest_tolerance=error if turns else None,
        end_to_end=True,
        samples=1,
        seed=seed,
        checks={
            "semantic": f"outputs differ by {error:.1e} in float64",
            "rounding": f"half a unit in the last place of the weights moves them by {seen.rounding:.1e}",
            "power": f"1 % of error in the weights moves them by {seen.noticed:.1e}",
        },
        reasons=(reason,) if reason else (),
    )


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
    moved = duplicate(twin)
    for parameter, original in zip(moved.parameters(), stored.parameters(), strict=True):
        if parameter.is_floating_point():
            uniform = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
            parameter.data.mul_(1 + step(uniform.to(parameter.device), original.dtype))
    return compare(output, run(moved, sample, seed=seed, dtype=torch.float64)).error


def _half_ulp(uniform: Tensor, dtype: torch.dtype) -> Tensor:
    return uniform * (torch.finfo(dtype).eps / 2)


def _one_percent(uniform: Tensor, _: torch.dtype) -> Tensor:
    return uniform * _PERTURBATION
