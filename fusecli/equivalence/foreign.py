"""Two models and nothing known of how one became the other: outputs are all there is to compare.

The fused weights were rounded once, so float64 outputs differ by what that rounding does. How much that is, is
measured: the fused model's weights are moved by half a unit in their last place, several times.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from fusecli.outcome import Judgement, Verdict
from fusecli.equivalence.compare import TOLERANCE, Incomparable, compare
from fusecli.equivalence.run import Sample, run

_DRAWS = 4
_MARGIN = 10.0  # the largest of a few draws is not the largest there is
_PERTURBATION = 0.01


def judge_foreign(original: nn.Module, fused: nn.Module, sample: Sample, seed: int) -> Verdict:
    """The verdict on end-to-end outputs alone; what they cannot show is inconclusive."""
    a, b = copy.deepcopy(original).double(), copy.deepcopy(fused).double()
    try:
        return _judged(a, b, fused, sample, seed)
    except Incomparable as odd:
        return Verdict(Judgement.INCONCLUSIVE, seed=seed, reasons=(str(odd),))
    except Exception as error:  # whatever somebody's forward may raise
        reason = f"the models do not run in float64: {type(error).__name__}: {error}"
        return Verdict(Judgement.INCONCLUSIVE, seed=seed, reasons=(reason,))


def _judged(a: nn.Module, b: nn.Module, fused: nn.Module, sample: Sample, seed: int) -> Verdict:
    reference = run(a, sample, seed=seed, dtype=torch.float64)
    again = compare(reference, run(a, sample, seed=seed + 1_000_003, dtype=torch.float64))
    output = run(b, sample, seed=seed, dtype=torch.float64)
    difference = compare(reference, output)
    rounding = max(_moved(b, fused, output, sample, seed, _half_ulp) for _ in range(_DRAWS))
    noticed = _moved(b, fused, output, sample, seed, _one_percent)
    line = max(TOLERANCE, _MARGIN * rounding)
    if again.error > TOLERANCE:
        judgement, reason = Judgement.INCONCLUSIVE, "the original model disagrees with itself on the same input"
    elif difference.error > line:
        judgement, reason = Judgement.DIFFERENT, difference.why or f"relative error {difference.error:.1e} in float64"
    elif noticed <= line:
        judgement, reason = Judgement.INCONCLUSIVE, "the outputs do not notice weights that are off by 1 %"
    else:
        judgement, reason = Judgement.EQUIVALENT, ""
    return Verdict(
        judgement=judgement,
        float64_error=difference.error,
        tolerance=line,
        smallest_tolerance=difference.error if math.isfinite(difference.error) else None,
        end_to_end=True,
        samples=1,
        seed=seed,
        checks={
            "semantic": f"outputs differ by {difference.error:.1e} in float64",
            "rounding": f"half a unit in the last place of the stored weights moves them by {rounding:.1e}",
            "power": f"1 % of error in the weights moves them by {noticed:.1e}",
        },
        reasons=(reason,) if reason else (),
    )


def _moved(
    twin: nn.Module,
    stored: nn.Module,
    output: object,
    sample: Sample,
    seed: int,
    step: Callable[[torch.Tensor, torch.dtype], torch.Tensor],
) -> float:
    """How far the output of `twin` moves when its parameters do."""
    moved = copy.deepcopy(twin)
    for parameter, original in zip(moved.parameters(), stored.parameters(), strict=True):
        if parameter.is_floating_point():
            parameter.data.mul_(1 + step(torch.rand_like(parameter) * 2 - 1, original.dtype))
    return compare(output, run(moved, sample, seed=seed, dtype=torch.float64)).error


def _half_ulp(uniform: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return uniform * (torch.finfo(dtype).eps / 2)


def _one_percent(uniform: torch.Tensor, _: torch.dtype) -> torch.Tensor:
    return uniform * _PERTURBATION
