"""Findings weighed: what the checks saw becomes one verdict.

Semantic   float64 twins of original and fused model agree, per group and end to end
Drift      as users run it, in the stored dtype, the fused model's error is at most 10 times the original's
Power      every group ran, and 1 % of error in its weights would have been noticed
From disk  the stored tensors are the float64 fold, rounded once; the rest is unchanged
Sizes      the twins agree where each axis of the inputs is one longer, as far as the original runs so
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fusecli.outcome import Judgement, LedgerEntry, Verdict
from fusecli.plain import some
from fusecli.proof.compare import Difference
from fusecli.proof.groups import GroupCheck
from fusecli.proof.noise import drifts, tolerance
from fusecli.proof.sizes import Shown
from fusecli.proof.training import Training

_FAST = "on the fast path that torch takes without hooks and modes"
_BY_DTYPE = "in the stored dtype, where the original computes something else than in float64"


@dataclass
class Findings:
    """Collected on the way, `dtype` being the narrowest that is stored; the lists hold sentences.

    erratic    why the model is no function of its input: it can be neither proven nor disproven end to end
    unmeasured why there is no run in the stored dtype
    misstored  which stored tensors do not hold the fold
    broken     why the fused model does not run in the stored dtype, where the original does
    drift      of the sample on which it is the most, for the original's own `noise` on the same sample
    channel_noise  the largest error of one channel of the original in the stored dtype
    sizes      for which sizes the verdict speaks; None: no others were tried
    way        the operations of the original on the first sample, by name
    unwatched  as users run it, the original is another function than in float64 under hooks: a fast path
    by_dtype   in its stored dtype the original is another function than in float64, and the fold is not
    """

    checks: list[GroupCheck]
    dtype: torch.dtype = torch.float32
    end: Difference = field(default_factory=Difference)
    inside: Difference = field(default_factory=Difference)
    noise: float | None = None
    drift: float | None = None
    channel_noise: float | None = None
    erratic: list[str] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    misstored: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    unwatched: bool = False
    by_dtype: bool = False
    sizes: Shown | None = None
    ledger: list[LedgerEntry] = field(default_factory=list)
    way: list[str] = field(default_factory=list)
    disk: str = ""
    runs: int = 0
    training: Training | None = None

    def note_stored(self, wrong: Sequence[str], total: int) -> None:
        """The result of comparing `total` stored tensors; `wrong` are the keys of those that do not hold."""
        if wrong:
            self.misstored.append(f"stored tensors do not hold the fold: {some(wrong)}")
            self.disk = f"{len(wrong)} of {total} stored tensors do not hold the fold"
        else:
            self.disk = f"{total} stored tensors are the exact values, rounded once"

    def note_drift(self, drift: float, noise: float, channel_noise: float) -> None:
        """One sample's numbers. An original that is noisy on one of them excuses no drift on another."""
        self.channel_noise = max(self.channel_noise or 0.0, channel_noise)
        least = torch.finfo(self.dtype).eps
        if drift / max(noise, least) >= (self.drift or 0.0) / max(self.noise or 0.0, least):
            self.drift, self.noise = drift, noise

    @property
    def tolerance(self) -> float:
        return tolerance(self.channel_noise, self.dtype)

    @property
    def whole_differs(self) -> bool:
        worst = max(self.end.error, self.inside.error)
        return not self.erratic and worst > self.tolerance

    @property
    def too_far(self) -> bool:
        overflown = any(check.overflown for check in self.checks)
        far = drifts(self.drift, self.noise, self.dtype) or overflown or bool(self.broken)
        return not self.erratic and far


def verdict_of(found: Findings, seed: int) -> Verdict:
    """The verdict: the worst that one of the checks says; its reasons are the definite ones first."""
    groups = sorted(found.checks, key=lambda check: (check.order is None, check.order))
    different = [check for check in groups if check.judgement is Judgement.DIFFERENT]
    results = _results(found)
    errors = [found.end.error, found.inside.error, *(check.difference.error for check in found.checks)]
    return Verdict(
        judgement=(judgement := _worst(results)),
        float64_error=found.end.error if found.runs else None,
        drift=found.drift,
        noise_floor=found.noise,
        tolerance=found.tolerance,
        smallest_tolerance=_accepting(found, errors, judgement),
        first_different=different[0].members if different else None,
        end_to_end=found.runs > 0,
        samples=found.runs,
        seed=seed,
        checks=_sentences(found),
        check_results=results,
        reasons=(*_differences(found, different), *_doubts(found, groups)),
        ledger=tuple(found.ledger),
    )


def _accepting(found: Findings, errors: Sequence[float], judgement: Judgement) -> float | None:
    """The smallest tolerance that the verdict would be `equivalent` with: the largest of the errors. None
    where no tolerance would turn it: what is wrong is no matter of float64 errors, or they are not numbers,
    or with that tolerance a weight that is off by 1 % would be accepted too."""
    largest = max(errors)
    if judgement is Judgement.EQUIVALENT:
        return largest
    others = [result for name, result in _results(found).items() if name not in ("semantic", "power")]
    turns = (
        judgement is Judgement.DIFFERENT
        and all(result is Judgement.EQUIVALENT for result in others)
        and not (found.erratic or any(check.trouble or check.undefined for check in found.checks))
        and all(check.ran and check.noticed > largest for check in found.checks)
    )
    return largest if turns and math.isfinite(largest) else None


def _worst(results: Mapping[str, Judgement]) -> Judgement:
    for judgement in (Judgement.DIFFERENT, Judgement.INCONCLUSIVE):
        if judgement in results.values():
            return judgement
    return Judgement.EQUIVALENT


def _differences(found: Findings, different: Sequence[GroupCheck]) -> list[str]:
    reasons = [f"{' + '.join(check.members)}: {check.why}" for check in different if check.differs]
    if found.whole_differs:
        reasons.append(f"end to end: {_whole(found)}")
    if found.too_far and not found.broken:
        noise = f"10 times the noise floor {found.noise or 0.0:.1e}"
        drift = f"drift {found.drift or math.inf:.1e}"
        if found.unwatched or found.by_dtype:
            how, error = _BY_DTYPE if found.by_dtype else _FAST, f"{found.drift or math.inf:.1e}"
            drift = f"as users run them, {how}, original and fold differ by {error}, which"
        reasons.append(f"{drift} is above {noise}")
    trains = found.training is None or found.training.judgement is not Judgement.DIFFERENT
    reasons += [] if trains else [f"in train mode {found.training.said}"]  # type: ignore[union-attr]
    return [*reasons, *found.broken, *found.misstored]


def _whole(found: Findings) -> str:
    if found.end.error > found.tolerance or found.end.why:
        return found.end.why or f"relative error {found.end.error:.1e} in float64"
    hidden = f"{found.inside.where} has a relative error of {found.inside.error:.1e}"
    return f"the outputs do not show it, but {hidden}"


def _doubts(found: Findings, groups: Sequence[GroupCheck]) -> list[str]:
    unsure = [check for check in groups if check.judgement is Judgement.INCONCLUSIVE]
    return [
        *found.erratic,
        *found.unmeasured,
        *([found.training.doubt] if found.training and found.training.doubt else []),
        *(f"{' + '.join(check.members)}: {check.why}" for check in unsure),
    ]


def _results(found: Findings) -> dict[str, Judgement]:
    """What each check says by itself."""

    def result(wrong: bool, unsure: bool) -> Judgement:
        if wrong:
            return Judgement.DIFFERENT
        return Judgement.INCONCLUSIVE if unsure else Judgement.EQUIVALENT

    checks = found.checks
    differ = found.whole_differs or any(check.differs for check in checks)
    unseen = any(not check.ran or check.undefined for check in checks if not check.differs)
    blind = any(not check.ran or check.noticed <= check.tolerance for check in checks if not check.differs)
    return {
        "semantic": result(differ, bool(found.erratic) or unseen),
        "drift": result(found.too_far, bool(found.unmeasured)),
        "power": result(False, blind),
        "from disk": result(bool(found.misstored), not found.disk),
        **({"sizes": result(found.sizes.wrong is not None, False)} if found.sizes else {}),
        **({"training": found.training.judgement} if found.training else {}),
    }


def _sentences(found: Findings) -> dict[str, str]:
    checks, total = found.checks, len(found.checks)
    equal = sum(check.ran and not check.differs and not check.undefined for check in checks)
    noticed = sum(check.noticed > check.tolerance for check in checks)
    end = f"{found.end.error:.1e}" if found.runs else "not run"
    if found.inside.error > found.tolerance:
        end += f", inside {found.inside.error:.1e}"
    drift = "not measured end to end"
    if found.drift is not None and found.noise is not None:
        drift = f"{found.drift:.1e} against the original's own {found.noise:.1e} in the stored dtype"
        drift += f", {_FAST}" if found.unwatched else ""
    power = f"{noticed} of {total} groups ran and notice 1 % of error in their weights"
    return {
        "semantic": f"{equal} of {total} groups equal in float64; end to end {end}",
        "drift": f"{drift}, too far" if found.too_far else drift,
        "power": power,
        "from disk": found.disk,
        **({"sizes": found.sizes.sentence} if found.sizes else {}),
        **({"training": found.training.said} if found.training else {}),
    }
