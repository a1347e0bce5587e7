"""What the report says, derived once from an Outcome and used by every rendering."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusecli.outcome import Evidence, FileFacts, GroupReport, Judgement, LedgerEntry, Outcome, Unfused
from fusecli.report.figures import scientific

# More groups than this are not read one by one: the terminal shows the ones that matter.
READABLE_GROUPS = 12
WORST = 3
# Above this ratio of per-channel weight ranges, int8 with one scale per tensor loses the small channels.
INT8_HAZARD = 100.0
_CONSENT = "consent"


@dataclass(frozen=True)
class Fold:
    """One kind of fold and how many groups it took: conv_bn, Conv2d + BatchNorm2d → Conv2d, 33."""

    rule: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    count: int


def all_groups(outcome: Outcome) -> tuple[GroupReport, ...]:
    """The groups in the order of the run; `verify` may carry them in its verdict only."""
    if outcome.groups or outcome.verification is None:
        return outcome.groups
    return outcome.verification.groups


def lost(outcome: Outcome) -> tuple[LedgerEntry, ...]:
    """What was lost or changed."""
    return tuple(entry for entry in outcome.ledger if entry.kind != _CONSENT)


def consents(outcome: Outcome) -> tuple[LedgerEntry, ...]:
    """Whose code was allowed, and by whom."""
    return tuple(entry for entry in outcome.ledger if entry.kind == _CONSENT)


def notable_groups(groups: Sequence[GroupReport]) -> tuple[GroupReport, ...]:
    """All groups if they can be read at once; else those not equivalent, and the worst few of the rest."""
    if len(groups) <= READABLE_GROUPS:
        return tuple(groups)
    alarming = [group for group in groups if _alarming(group)]
    calm = [group for group in groups if not _alarming(group)]
    by_error = sorted(calm, key=lambda group: _rank(group.float64_error), reverse=True)[:WORST]
    by_drift = sorted(calm, key=lambda group: _rank(drift_ratio(group)), reverse=True)[:WORST]
    return (*alarming, *dict.fromkeys([*by_error, *by_drift]))


def folds(groups: Iterable[GroupReport]) -> tuple[Fold, ...]:
    """The kinds of fold, most frequent first, in order of first appearance among equals."""
    counts = Counter((group.rule, group.kinds_before, group.kinds_after) for group in groups)
    return tuple(Fold(*fold, count) for fold, count in counts.most_common())


def drift_ratio(group: GroupReport) -> float | None:
    """The group's drift as a multiple of its noise floor; None where either was not measured."""
    return ratio(group.drift, group.noise_floor)


def ratio(drift: float | None, noise_floor: float | None) -> float | None:
    if drift is None or noise_floor is None:
        return None
    if noise_floor == 0:
        # An original without any rounding error: no drift is as good as it, any drift is beyond measure.
        return 1.0 if drift == 0 else math.inf
    return drift / noise_floor


def trains(outcome: Outcome) -> bool:
    """Whether what was made is to be trained: nothing is folded, and it was proven in train mode too."""
    return outcome.verification is not None and "training" in outcome.verification.checks


def claimed_groups(groups: Iterable[GroupReport]) -> tuple[GroupReport, ...]:
    return tuple(group for group in groups if group.evidence is Evidence.CLAIMED)


def int8_hazards(groups: Iterable[GroupReport]) -> tuple[GroupReport, ...]:
    """Groups whose folded weight ranges differ too much between channels, the widest first."""
    wide = [group for group in groups if _rank(group.weight_range_after) > INT8_HAZARD]
    return tuple(sorted(wide, key=lambda group: _rank(group.weight_range_after), reverse=True))


def unfused_kinds(unfused: Iterable[Unfused]) -> dict[tuple[str, str, str], list[str]]:
    """(kind, code, reason) -> modules: a hundred LayerNorms are left for one reason, said once."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for norm in unfused:
        kinds.setdefault((norm.kind, norm.code, norm.reason), []).append(norm.module)
    return kinds


def changes_keys(group: GroupReport) -> bool:
    return bool(group.keys_removed or group.keys_renamed or group.keys_added)


def renames(groups: Iterable[GroupReport]) -> list[tuple[str, str]]:
    return [pair for group in groups for pair in group.keys_renamed]


def totals_rows(outcome: Outcome) -> list[tuple[str, int | None, int | None]]:
    """(what, before, after) for modules, parameters, bytes and norm layers; empty if nothing was counted."""
    before, after = outcome.totals_before, outcome.totals_after
    if before is None and after is None:
        return []
    names = {"modules": "modules", "parameters": "parameters", "bytes": "bytes", "norm layers": "norms"}
    rows = [(row, getattr(before, name, None), getattr(after, name, None)) for row, name in names.items()]
    counted = before is not None and before.ops is not None and after is not None and after.ops is not None
    return [*rows, ("op calls", before.ops, after.ops)] if counted and before and after else rows


def files(outcome: Outcome) -> list[tuple[str, FileFacts]]:
    roles = {"input": outcome.input, "spec": outcome.spec, "output": outcome.output}
    return [(role, file) for role, file in roles.items() if file is not None]


def check_result(outcome: Outcome, check: str) -> Judgement | None:
    """How one of the checks ended; None where the verdict does not say."""
    verdict = outcome.verification
    if verdict is None:
        return None
    # An equivalent verdict is the claim that every check passed: no check can disagree with it.
    return Judgement.EQUIVALENT if verdict.equivalent else verdict.check_results.get(check)


def unreal(group: GroupReport) -> tuple[str, ...]:
    """A sentence for each number that is not finite: strict JSON has no word for it."""
    measured = {
        "float64_error": group.float64_error,
        "drift": group.drift,
        "noise_floor": group.noise_floor,
        "weight_range_before": group.weight_range_before,
        "weight_range_after": group.weight_range_after,
    }
    return unreal_numbers(measured)


def unreal_numbers(measured: dict[str, float | None]) -> tuple[str, ...]:
    return tuple(
        f"{name} is not a finite number: {scientific(value)}"
        for name, value in measured.items()
        if value is not None and not math.isfinite(value)
    )


def _alarming(group: GroupReport) -> bool:
    return group.status in (Judgement.DIFFERENT.value, Judgement.INCONCLUSIVE.value)


def _rank(value: float | None) -> float:
    """For sorting worst last: not a number is worse than any number, not measured is better."""
    if value is None:
        return -1.0
    return math.inf if math.isnan(value) else value
