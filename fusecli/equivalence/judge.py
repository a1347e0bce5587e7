"""Is it still the same function? Four checks, one verdict.

Semantic   float64 twins of original and fused model agree, per group and end to end
Drift      in the stored dtype, the fused model's error is at most 10 times the original's own
Power      every group ran, and 1 % of error in its weights would have been noticed
From disk  the stored tensors are the float64 fold, rounded once; the rest is unchanged
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.errors import Problem, UsageError
from fusecli.outcome import Judgement, Verdict
from fusecli.equivalence.compare import TOLERANCE, Difference, Incomparable, compare
from fusecli.equivalence.groups import GroupCheck, observed
from fusecli.equivalence.run import Sample, changed_buffers, run
from fusecli.equivalence.stored import misstored

MAX_DRIFT = 10.0  # times the original's own error


@dataclass(frozen=True)
class Subject:
    """What is judged: models in eval mode that share nothing.

    original, fused   in the stored dtype; `fused` is what a user would load
    exact             the original in float64 with the same fold, not rounded
    groups            the members of every group, by path
    folded, foreign   state-dict keys of the fold, and of them those a custom fuser computed
    partly_fused      builds `exact` with the first n groups only, to find the one that breaks the whole
    """

    original: nn.Module
    fused: nn.Module
    exact: nn.Module
    groups: tuple[tuple[str, ...], ...]
    folded: Collection[str] = ()
    foreign: Collection[str] = ()
    partly_fused: Callable[[int], nn.Module] | None = None


@dataclass
class Findings:
    """Collected on the way; `inconclusive` and `different` are sentences."""

    checks: list[GroupCheck]
    end: Difference = field(default_factory=Difference)
    noise: float | None = None
    drift: float | None = None
    different: list[str] = field(default_factory=list)
    inconclusive: list[str] = field(default_factory=list)
    disk: str = ""
    runs: int = 0

    def note_stored(self, wrong: Sequence[str], total: int) -> None:
        """The result of comparing `total` stored tensors; `wrong` are the keys of those that do not hold."""
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            self.different.append(f"stored tensors do not hold the fold: {', '.join(wrong[:3])}{more}")
            self.disk = f"{len(wrong)} of {total} stored tensors do not hold the fold"
        else:
            self.disk = f"{total} stored tensors are the exact values, rounded once"


def judge(
    subject: Subject, samples: Sequence[Sample], *, seed: int, tick: Callable[[str], None] = lambda _: None
) -> tuple[Verdict, list[GroupCheck]]:
    """The verdict on `subject` and what was seen of each group.

    Raises UsageError where the original model cannot be run on the samples at all.
    """
    found = Findings(
        [
            GroupCheck(group, _modules(subject.exact, group), _modules(subject.fused, group))
            for group in subject.groups
        ]
    )
    _check_stored(subject, found)
    twin = copy.deepcopy(subject.original).double()
    for number, sample in enumerate(samples):
        tick(f"sample {number + 1} of {len(samples)}")
        try:
            reference = _semantic(subject, twin, sample, seed + number, found, alone=number == 0)
            _stored_dtype(subject, sample, seed + number, reference, found)
            found.runs += 1
        except Incomparable as odd:
            found.inconclusive.append(str(odd))
            break
        except _NoTwin as no:
            found.inconclusive.append(str(no))
            break
    _locate(subject, samples, seed, found)
    return verdict_of(found, seed, narrowest(subject.original.parameters())), found.checks


class _NoTwin(Exception):
    """The model runs, but not in float64."""


def _modules(model: nn.Module, group: tuple[str, ...]) -> list[nn.Module]:
    return [model.get_submodule(path) for path in group]


def _check_stored(subject: Subject, found: Findings) -> None:
    exact, stored = subject.exact.state_dict(), subject.fused.state_dict()
    found.note_stored(misstored(exact, stored, subject.folded, subject.foreign), len(stored))


def _semantic(
    subject: Subject, twin: nn.Module, sample: Sample, seed: int, found: Findings, *, alone: bool
) -> Any:
    """Float64 twins, group by group while the original runs, then end to end; returns the original's output."""
    before = {name: buffer.clone() for name, buffer in twin.named_buffers()}

    def tell(number: int, inputs: Sample, output: Any) -> None:
        check = found.checks[number]
        check.semantic(inputs, output)
        if check.order is None:
            check.order = sum(other.order is not None for other in found.checks)

    try:
        with observed(twin, subject.groups, tell) as trouble:
            reference = run(twin, sample, seed=seed, dtype=torch.float64)
    except Incomparable:
        raise
    except Exception as error:  # whatever somebody's forward may raise
        _explain_failure(subject, sample, seed, error)
    for check, said in zip(found.checks, trouble, strict=True):
        check.trouble = check.trouble or said
    if alone:
        _agrees_with_itself(twin, sample, seed, reference, before, found)
    try:
        output = run(subject.exact, sample, seed=seed, dtype=torch.float64)
        found.end = found.end.worse(compare(reference, output))
    except Incomparable:
        raise
    except Exception as error:
        found.end = Difference(float("inf"), "output", f"the fused model raises {type(error).__name__}: {error}")
    return reference


def _explain_failure(subject: Subject, sample: Sample, seed: int, error: Exception) -> None:
    """A model that does not run in its own dtype either got the wrong inputs; else it has no float64 twin."""
    try:
        run(subject.original, sample, seed=seed)
    except Exception as plain:
        raise UsageError(
            Problem(
                f"the model does not run on these inputs: {type(plain).__name__}: {plain}",
                "inputs",
                "give one entry per forward argument, with the shape and dtype it expects",
            )
        ) from plain
    raise _NoTwin(f"the model does not run in float64: {type(error).__name__}: {error}") from error


def _agrees_with_itself(
    twin: nn.Module, sample: Sample, seed: int, reference: Any, before: dict[str, Any], found: Findings
) -> None:
    again = compare(reference, run(twin, sample, seed=seed + 1_000_003, dtype=torch.float64))
    if again.error <= TOLERANCE:
        return
    if again.why.startswith("NaN"):
        found.inconclusive.append(f"the original model returns NaN at {again.where}")
        return
    buffers = changed_buffers(before, twin)
    cause = f"it writes to its buffers {', '.join(buffers[:3])}" if buffers else "it draws random numbers"
    found.inconclusive.append(f"the original model disagrees with itself on the same input: {cause}")


def _stored_dtype(subject: Subject, sample: Sample, seed: int, reference: Any, found: Findings) -> None:
    def tell(number: int, inputs: Sample, output: Any) -> None:
        check = found.checks[number]
        if check.judgement is Judgement.EQUIVALENT:
            check.stored(inputs, output)

    try:
        with observed(subject.original, subject.groups, tell):
            original = run(subject.original, sample, seed=seed)
        fused = run(subject.fused, sample, seed=seed)
    except Incomparable:
        raise
    except Exception as error:  # e.g. an op that this CPU build has not got in float16
        found.inconclusive.append(f"not run in the stored dtype: {type(error).__name__}: {error}")
        return
    found.noise = max(found.noise or 0.0, compare(reference, original).error)
    found.drift = max(found.drift or 0.0, compare(reference, fused).error)


def drifts(drift: float | None, noise: float | None, dtype: torch.dtype) -> bool:
    """Whether the fused model's error is beyond 10 times the original's own. An original that happens to be
    exact is granted the rounding of its dtype."""
    if drift is None or noise is None:
        return False
    return not drift <= MAX_DRIFT * max(noise, torch.finfo(dtype).eps)


def _locate(subject: Subject, samples: Sequence[Sample], seed: int, found: Findings) -> None:
    """Names the group that breaks the whole where each group alone is right, by halving the list."""
    broken = found.end.error > TOLERANCE and not found.inconclusive
    if not broken or subject.partly_fused is None or any(c.judgement is Judgement.DIFFERENT for c in found.checks):
        return
    reference = run(copy.deepcopy(subject.original).double(), samples[0], seed=seed, dtype=torch.float64)
    low, high = 0, len(found.checks)
    while high - low > 1:
        middle = (low + high) // 2
        output = run(subject.partly_fused(middle), samples[0], seed=seed, dtype=torch.float64)
        low, high = (low, middle) if compare(reference, output).error > TOLERANCE else (middle, high)
    found.checks[high - 1].trouble = (
        "right by itself, but the model differs once it is fused: something else reads a tensor inside it"
    )


def verdict_of(found: Findings, seed: int, dtype: torch.dtype) -> Verdict:
    """Findings weighed: one definite difference outweighs all, then every doubt counts."""
    groups = sorted(found.checks, key=lambda check: (check.order is None, check.order))
    different = [check for check in groups if check.judgement is Judgement.DIFFERENT]
    unsure = [check for check in groups if check.judgement is Judgement.INCONCLUSIVE]
    reasons = [f"{' + '.join(check.members)}: {check.why}" for check in different]
    too_far = drifts(found.drift, found.noise, dtype)
    ran = found.runs > 0
    if ran and found.end.error > TOLERANCE:
        reasons.append(f"end to end: {found.end.why or f'relative error {found.end.error:.1e} in float64'}")
    if too_far:
        reasons.append(f"drift {found.drift:.1e} is above 10 times the noise floor {found.noise:.1e}")
    reasons += found.different
    doubts = [*found.inconclusive, *(f"{' + '.join(check.members)}: {check.why}" for check in unsure)]
    # A model that is no function of its input can neither be proven nor be disproven by running it.
    erratic = bool(found.inconclusive) and not different and not found.different
    if reasons and not erratic:
        judgement = Judgement.DIFFERENT
    else:
        judgement = Judgement.INCONCLUSIVE if doubts else Judgement.EQUIVALENT
    errors = [found.end.error, *(check.difference.error for check in found.checks)]
    return Verdict(
        judgement=judgement,
        float64_error=found.end.error if ran else None,
        drift=found.drift,
        noise_floor=found.noise,
        tolerance=TOLERANCE,
        smallest_tolerance=max(errors) if max(errors) < float("inf") else None,
        first_different=different[0].members if different else None,
        end_to_end=ran,
        samples=found.runs,
        seed=seed,
        checks=_sentences(found, ran, too_far),
        check_results=_results(found, ran, too_far),
        reasons=(*reasons, *doubts),
    )


def _results(found: Findings, ran: bool, too_far: bool) -> dict[str, Judgement]:
    """What each of the four checks says by itself."""

    def result(wrong: bool, unsure: bool) -> Judgement:
        if wrong:
            return Judgement.DIFFERENT
        return Judgement.INCONCLUSIVE if unsure else Judgement.EQUIVALENT

    checks = found.checks
    differ = any(check.judgement is Judgement.DIFFERENT for check in checks) or found.end.error > TOLERANCE
    idle = any(not check.calls or check.noticed <= TOLERANCE for check in checks)
    erratic = bool(found.inconclusive)
    return {
        "semantic": result(differ and not erratic, erratic or any(not check.calls for check in checks)),
        "drift": result(too_far and not erratic, ran and found.drift is None),
        "power": result(False, idle),
        "from disk": result(bool(found.different), not found.disk),
    }


def _sentences(found: Findings, ran: bool, too_far: bool) -> dict[str, str]:
    equal = sum(check.difference.error <= TOLERANCE and not check.trouble and check.calls > 0 for check in found.checks)
    noticed = sum(check.noticed > TOLERANCE for check in found.checks)
    total = len(found.checks)
    end = f"{found.end.error:.1e}" if ran else "not run"
    drift = "not measured end to end"
    if found.drift is not None and found.noise is not None:
        far = ", too far" if too_far else ""
        drift = f"{found.drift:.1e} against the original's own {found.noise:.1e} in the stored dtype{far}"
    return {
        "semantic": f"{equal} of {total} groups equal in float64; end to end {end}",
        "drift": drift,
        "power": f"{noticed} of {total} groups ran and notice 1 % of error in their weights",
        "from disk": found.disk,
    }


def narrowest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest floating dtype among them: it sets the noise."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} or {torch.float32}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
