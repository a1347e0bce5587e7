"""The sentences of the verdict, written once: what was proven, observed, claimed, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fusecli.errors import ExitCode
from fusecli.outcome import Evidence, GroupReport, Judgement, Outcome, Verdict
from fusecli.report import facts
from fusecli.report.figures import counted, scientific, size, times


@dataclass(frozen=True)
class Headline:
    """The verdict in one glance; `judgement` None: nothing was judged."""

    judgement: Judgement | None
    title: str
    detail: str


_HEADLINES = {
    "fused": (Judgement.EQUIVALENT, "fused, equivalent"),
    "verified": (Judgement.EQUIVALENT, "verified, equivalent"),
    "quantized": (Judgement.EQUIVALENT, "quantized, within its thresholds"),
    "planned": (None, "planned, nothing written"),
    "proposed": (None, "planned: a spec of all that is sound"),
    "partly fused": (Judgement.DIFFERENT, "partly fused: groups that failed verification were left out"),
    "different": (Judgement.DIFFERENT, "different: not the same function"),
    "inconclusive": (Judgement.INCONCLUSIVE, "inconclusive: neither proven nor disproven"),
    "refused": (Judgement.DIFFERENT, "refused"),
    "nothing to fuse": (None, "nothing to fuse"),
    "error": (Judgement.DIFFERENT, "error"),
}
_INT8 = {
    "verified": "verified, within its thresholds",
    "different": "below its thresholds",
    "inconclusive": "inconclusive: no threshold decides",
}
_FAILURES = {
    ExitCode.USAGE: "error: the spec or the command line",
    ExitCode.UNSAFE: "refused: unsafe or unreadable input",
    ExitCode.REFUSED: "refused: a requested fusion is unsound or unsupported",
    ExitCode.BUG: "internal error: a bug in fusecli",
}
# Below the refusals, which name a code each.
MORE = "'fusecli explain CODE' says more"
_VERBS = {"fused": "folded", "partly fused": "folded", "verified": "verified", "planned": "planned"}
_REMEDIES = {
    "different": "leave the group that differs out of the spec, or correct its pairing, and fuse again",
    "inconclusive": "give inputs that run every group (`inputs:` in the spec), or more of them (--samples)",
    "undecidable": "see what is named above: that keeps the fold from being judged, the groups were run",
    "refused": "follow the remedies, or leave the refused groups out of the spec",
    "nothing to fuse": "check with `fusecli inspect` that this checkpoint still holds norm layers",
    "error": "correct the problems and run the command again",
}


def headline(outcome: Outcome) -> Headline:
    """The status as a verdict. A success that no check stands behind is not shown as one."""
    judgement, title = _HEADLINES.get(outcome.status, (None, outcome.status))
    if outcome.quantization is not None:
        return Headline(judgement, _INT8.get(outcome.status, title), _counts(outcome))
    if judgement is Judgement.EQUIVALENT and outcome.verification is None:
        judgement, title = None, f"{outcome.status}, not verified"
    elif judgement is Judgement.EQUIVALENT and facts.claimed_groups(facts.all_groups(outcome)):
        title += " as claimed"
    elif outcome.status in ("refused", "error"):
        title = _FAILURES.get(outcome.exit_code, title)
    return Headline(judgement, title, _counts(outcome))


def next_step(outcome: Outcome) -> str:
    """What to do now; a failure is never left without it."""
    return outcome.next_step or _REMEDIES.get(_kind(outcome), "")


def _kind(outcome: Outcome) -> str:
    """The status, but for a doubt that no input could remove: the reasons name it."""
    verdict = outcome.verification
    if outcome.status != "inconclusive" or verdict is None or not verdict.reasons:
        return outcome.status
    seen = verdict.check_results.get("power") is Judgement.EQUIVALENT
    return "undecidable" if seen else outcome.status


def names(group: GroupReport) -> str:
    return " + ".join(group.modules)


def grounds(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """(label, sentence) pairs under the headline: what the verdict rests on, and what it does not."""
    yield from (("problem", problem) for problem in outcome.problems)
    # The ledger says so too, far above: whoever reads only the verdict has to know which file it is about.
    other = [entry for entry in outcome.ledger if entry.kind == "input" and not outcome.problems]
    yield from (("input", f"{entry.where} {entry.what}") for entry in other)
    if outcome.recording:
        yield "recorded", outcome.recording
    if outcome.verification is not None:
        yield from _measured(outcome, outcome.verification)
    yield from _claimed(outcome)
    yield from _written(outcome)


def _measured(outcome: Outcome, verdict: Verdict) -> Iterator[tuple[str, str]]:
    groups = facts.all_groups(outcome)
    limit = scientific(verdict.tolerance)
    if verdict.equivalent:
        scope = f"{counted(len(groups), 'group')}{' and end to end' if verdict.end_to_end else ''}"
        error = scientific(_largest_error(groups, verdict))
        yield "proven", f"float64 twins agree to {error} (limit {limit}), in {scope}"
    if verdict.first_different:
        yield "differs", f"first at {' + '.join(verdict.first_different)}"
    if verdict.smallest_tolerance is not None and not verdict.equivalent:
        yield (
            "tolerance",
            f"{scientific(verdict.smallest_tolerance)} would accept it, no less; the limit is {limit}",
        )
    yield from (("because", reason) for reason in verdict.reasons)
    if verdict.samples:
        yield "observed", _observed(verdict)


def _observed(verdict: Verdict) -> str:
    ran = "both models ran end to end" if verdict.end_to_end else "groups ran one by one, not end to end,"
    drift = facts.ratio(verdict.drift, verdict.noise_floor)
    drifted = "" if drift is None else f"; drift is {times(drift)} the original's own error"
    return f"{ran} on {counted(verdict.samples, 'input')} (seed {verdict.seed}){drifted}"


def _claimed(outcome: Outcome) -> Iterator[tuple[str, str]]:
    groups = facts.all_groups(outcome)
    claimed = len(facts.claimed_groups(groups))
    if claimed:
        which = "every group" if claimed == len(groups) else f"{claimed} of {len(groups)} groups"
        yield (
            str(Evidence.CLAIMED),
            f"that the modules of {which} follow each other: your list was believed, no run has shown it",
        )


def _written(outcome: Outcome) -> Iterator[tuple[str, str]]:
    if outcome.quantization is not None:
        yield from _written_int8(outcome)
        return
    if outcome.status in ("fused", "partly fused") and outcome.output is not None:
        yield "written", f"{outcome.output.path} ({size(outcome.output.bytes)})"
        yield "load with", "fusecli.load_fused, not load_state_dict: the structure changed"
    elif outcome.status not in ("fused", "partly fused", "verified", "planned") and _fuses(outcome):
        yield "written", "nothing"


def _written_int8(outcome: Outcome) -> Iterator[tuple[str, str]]:
    if outcome.command != "quantize":
        return
    if outcome.output is None:
        yield "written", "nothing"
        return
    yield "written", f"{outcome.output.path} ({size(outcome.output.bytes)})"
    if outcome.output.format == "pt2":
        yield (
            "load with",
            "fusecli.load_int8(path, allow_pickle=True), or torch.export.load after import torchao",
        )


def _fuses(outcome: Outcome) -> bool:
    words = [word for word in outcome.command.split() if word != "fusecli"]
    return words[:1] == ["fuse"]


def _largest_error(groups: tuple[GroupReport, ...], verdict: Verdict) -> float | None:
    errors = [group.float64_error for group in groups] + [verdict.float64_error]
    return max((error for error in errors if error is not None), default=None)


def _counts(outcome: Outcome) -> str:
    groups = facts.all_groups(outcome)
    units = outcome.quantization.units if outcome.quantization is not None else ()
    verb = "folded" if outcome.quantization is not None else _VERBS.get(outcome.status, "checked")
    if verb == "folded" and facts.trains(outcome):
        verb = "fused for training"
    found = [f"{counted(len(units), 'unit')} int8"] if units else []
    found += [f"{counted(len(groups), 'group')} {verb}"] if groups else []
    if outcome.refused:
        found.append(f"{len(outcome.refused):,} refused")
    if outcome.unfused:
        found.append(f"{counted(len(outcome.unfused), 'norm')} left")
    return ", ".join([*found, f"exit {int(outcome.exit_code)}"])
