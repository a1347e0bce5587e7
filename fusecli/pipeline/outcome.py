"""What a fold came to, for the report: made once, when everything is known."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from fusecli.engine import Decision, needed
from fusecli.errors import ExitCode
from fusecli.outcome import (
    Evidence,
    FileFacts,
    GroupReport,
    Judgement,
    LedgerEntry,
    Outcome,
    Refusal,
    Totals,
    Unfused,
    Verdict,
)
from fusecli.pipeline import facts
from fusecli.pipeline.fold import Fold, edited_structure, keys_by_module
from fusecli.pipeline.prove import Proof
from fusecli.pipeline.record import ops_after, seen
from fusecli.pipeline.select import Selection
from fusecli.pipeline.settle import Settled
from fusecli.pipeline.weight_ranges import Ranges
from fusecli.plain import some
from fusecli.proof.groups import GroupCheck
from fusecli.spec import Spec

FUSED = {
    Judgement.EQUIVALENT: ("fused", ExitCode.OK),
    Judgement.DIFFERENT: ("different", ExitCode.DIFFERENT),
    Judgement.INCONCLUSIVE: ("inconclusive", ExitCode.INCONCLUSIVE),
}
VERIFIED = {**FUSED, Judgement.EQUIVALENT: ("verified", ExitCode.OK)}
_WORST_FIRST = (Judgement.DIFFERENT, Judgement.INCONCLUSIVE, Judgement.EQUIVALENT)


@dataclass(frozen=True)
class Made:
    """What was made of a fold: the fused model, in memory or without numbers; how it was judged; what was
    lost or changed besides; the file, where it is written to one."""

    model: nn.Module
    verdict: Verdict
    ledger: tuple[LedgerEntry, ...]
    output: FileFacts | None = None


def weighed(
    proof: Proof,
    model: nn.Module,
    *,
    ledger: Iterable[LedgerEntry],
    ranges: Mapping[int, Ranges] | None = None,
    strict: bool = False,
) -> Made:
    """A proof with all that the report says of each group: the verdict that counts.

    model   the fused one; `ledger` is what it changes or rests on
    strict  what is only claimed, assumed or lost makes a right fold inconclusive
    """
    fold = proof.fold
    reports = _with_numbers(group_reports(fold, model, ranges or {}), proof.checks)
    same_path = fold.source.vocabulary.same_path
    verdict, reports = _on_all_paths(proof.verdict, reports, fold.decisions, assumed=same_path)
    known = (*ledger, *verdict.ledger)
    verdict = replace(verdict, groups=reports)
    if strict:
        verdict = _strictly(verdict, known)
    return Made(model, verdict, known)


def ledger_of(selection: Selection, fold: Fold) -> tuple[LedgerEntry, ...]:
    """What a fold changes or rests on, before it is made."""
    source, recording = fold.source, seen(selection.run)
    return (
        *source.ledger,
        *facts.statistics_ledger(source.checkpoint, fold.members),
        *fold.learned.ledger,
        *facts.tie_ledger(source.checkpoint, fold.layout.keys()),
        *facts.unshared_ledger(needed(source.unshared, fold.decisions)),
        *facts.caveat_ledger(fold.decisions, recording),
        *facts.path_ledger(fold.decisions),
        *facts.residual_ledger(selection.operator_residual),
    )


def outcome_of(settled: Settled[Made], spec: Spec) -> Outcome:
    """The outcome of a fuse."""
    selection, fold, made = settled.selection, settled.fold, settled.made
    if fold is None:
        return _refused(selection, settled.refused, spec)
    unfused = selection.unfused(fold.decisions) + unlisted_norms(selection)
    outcome = replace(_begun(selection, spec), unfused=unfused, refused=tuple(selection.dropped.values()))
    if made is None:
        return _nothing(outcome, selection, fold, spec)
    status, code = FUSED[made.verdict.judgement]
    if code is ExitCode.OK and selection.fell_short:
        status, code = "partly fused", ExitCode.DIFFERENT
    after = facts.totals(fold.layout, _whole(selection, made.model))
    return replace(
        outcome,
        status=status,
        exit_code=code,
        groups=made.verdict.groups,
        refused=(*outcome.refused, *(no for decision in fold.decisions for no in decision.left_out)),
        verification=made.verdict,
        ledger=made.ledger,
        output=made.output if made.verdict.judgement is Judgement.EQUIVALENT else None,
        totals_after=replace(after, ops=ops_after(fold, selection.run)),
    )


def short(selection: Selection, fold: Fold, problems: Sequence[str], spec: Spec) -> Outcome:
    """The outcome where fewer norms are folded than somebody has asked for; nothing was tried."""
    return replace(
        _begun(selection, spec),
        groups=tuple(group_reports(fold, edited_structure(fold)[0], {})),
        refused=tuple(selection.dropped.values()),
        unfused=selection.unfused(fold.decisions) + unlisted_norms(selection),
        problems=tuple(problems),
        next_step="'fusecli plan' writes a spec that folds every norm that can be folded",
    )


def _begun(selection: Selection, spec: Spec) -> Outcome:
    """What is known before anything is made: so far it is refused."""
    return Outcome(
        "fuse",
        "refused",
        ExitCode.REFUSED,
        spec=facts.spec_facts(spec),
        environment=facts.environment(),
        totals_before=totals_before(selection, ops=True),
        recording=recorded(selection),
    )


def totals_before(selection: Selection, *, ops: bool = False) -> Totals:
    layout = facts.layout_of(selection.source.checkpoint)
    stored = selection.stored or selection.structure
    totals = facts.totals(layout, _whole(selection, stored.model))
    recording = seen(selection.run) if ops else None
    return replace(totals, ops=recording.steps if recording is not None else None)


def _whole(selection: Selection, model: nn.Module) -> nn.Module | None:
    """The model, where it is the user's own and not made of stand-ins."""
    return model if selection.source.build is not None else None


def recorded(selection: Selection) -> str:
    """How the graph was recorded, for the report."""
    recording = seen(selection.run)
    return f"{len(recording.calls):,} op calls of one forward" if recording is not None else ""


def unlisted_norms(selection: Selection) -> tuple[Unfused, ...]:
    return facts.unlisted_norms(selection.source.checkpoint, selection.modules)


def _refused(selection: Selection, refused: Sequence[Refusal], spec: Spec) -> Outcome:
    source = selection.source
    if source.build is None:
        refused = [_with_remedy(refusal) for refusal in refused]
    return replace(
        _begun(selection, spec),
        refused=tuple(refused),
        unfused=selection.unfused((), refused) + unlisted_norms(selection),
        ledger=(*source.ledger, *facts.statistics_ledger(source.checkpoint, selection.names)),
    )


def _with_remedy(refusal: Refusal) -> Refusal:
    """Without model code, a shape that does not fit is most often a transposed convolution's."""
    if refusal.code != "shape" or refusal.remedy:
        return refusal
    fix = "a state dict does not tell a transposed convolution, nor its groups"
    return replace(refusal, remedy=f"{fix}: say {{modules: [...], kind: conv_transpose2d, groups: 1}}")


def _nothing(outcome: Outcome, selection: Selection, fold: Fold, spec: Spec) -> Outcome:
    if selection.dropped:
        why, step = "no group is left that can be fused", "see the reasons of the norms that are left"
    elif fold.done:
        why, step = "every group of the spec is fused already", ""
    elif spec.discover:
        why, step = "the dataflow offers nothing to fold", "'fusecli explain CODE' says more"
    else:
        why = "the spec lists no groups"
        step = "add groups to the spec; 'fusecli plan' writes them where the model's code is at hand"
    failed = selection.fell_short
    return replace(
        outcome,
        status="different" if failed else "nothing to fuse",
        exit_code=ExitCode.DIFFERENT if failed else ExitCode.NOTHING,
        ledger=(*selection.source.ledger, *facts.residual_ledger(selection.operator_residual)),
        problems=(why,),
        next_step=step,
    )


def group_reports(fold: Fold, fused: nn.Module, ranges: Mapping[int, Ranges]) -> list[GroupReport]:
    """The structural facts of every group, with what became of the ranges of its weights; the verifier adds
    the numbers."""
    keymap, keys = fold.keymap, keys_by_module(fold.source)
    before, after = fold.structure.tree, dict(fused.named_modules(remove_duplicate=False))
    reports = []
    for number, decision in enumerate(fold.decisions):
        names = decision.group.modules
        stored = [key for path in decision.members for key in keys.get(path, ())]
        moved = [(key, keymap(key)) for key in stored]
        made = (key for key in fold.rewrites[number].tensors if key not in stored)
        wide, narrow = ranges.get(number, (None, None))
        reports.append(
            GroupReport(
                modules=names,
                rule=decision.rule,
                status="planned",
                evidence=decision.evidence,
                kinds_before=tuple(type(before[path]).__name__ for path in names),
                kinds_after=tuple(type(after[path]).__name__ for path in names),
                weight_range_before=wide,
                weight_range_after=narrow,
                keys_removed=tuple(old for old, new in moved if new is None),
                keys_renamed=tuple((old, new) for old, new in moved if new is not None and new != old),
                keys_added=tuple(new for key in made if (new := keymap(key)) is not None),
                kept=decision.kept,
                notes=(
                    *(f"{' + '.join(no.group)} stays: {no.reason}" for no in decision.left_out),
                    *(decision.caveats),
                ),
            )
        )
    return reports


def _with_numbers(reports: Sequence[GroupReport], checks: Sequence[GroupCheck]) -> tuple[GroupReport, ...]:
    """The structural facts of each group with what the proof measured."""
    return tuple(
        replace(
            report,
            status=str(check.judgement),
            float64_error=check.difference.error if check.ran else None,
            drift=check.drift,
            noise_floor=check.noise_floor,
            notes=(*report.notes, *filter(None, [check.why])),
        )
        for report, check in zip(reports, checks, strict=True)
    )


def _strictly(verdict: Verdict, ledger: Iterable[LedgerEntry]) -> Verdict:
    if verdict.judgement is not Judgement.EQUIVALENT:
        return verdict
    doubts = [
        f"--strict: {entry.where}: {entry.what}"
        for entry in ledger
        if entry.kind in ("hook", "assumed", "statistics")
    ]
    if any(group.evidence is Evidence.CLAIMED for group in verdict.groups):
        doubts.append("--strict: the groups are claimed by the spec, no run of the model has shown them")
    return _judged(verdict, Judgement.INCONCLUSIVE, doubts) if doubts else verdict


def _on_all_paths(
    verdict: Verdict, reports: Sequence[GroupReport], decisions: Sequence[Decision], *, assumed: bool
) -> tuple[Verdict, tuple[GroupReport, ...]]:
    """A right fold is inconclusive where modules beside it were never run, which may need what it takes away;
    unless it is `assumed` that no input goes there."""
    open_ones = [bool(decision.unrun) for decision in decisions]
    if not any(open_ones):
        return verdict, tuple(reports)
    result = Judgement.EQUIVALENT if assumed else Judgement.INCONCLUSIVE
    said = f"{sum(open_ones)} of {len(decisions)} groups hold for inputs that go through the modules that ran"
    verdict = replace(
        verdict,
        checks={**verdict.checks, "paths": said},
        check_results={**verdict.check_results, "paths": result},
    )
    if assumed:
        return verdict, tuple(reports)
    doubts = [
        f"{' + '.join(decision.members)}: no input ran {some(decision.unrun)} beside it; give inputs that "
        "do, or say --assume-same-path"
        for decision in decisions
        if decision.unrun
    ]
    marked = (
        replace(report, status=str(result))
        if is_open and report.status == str(Judgement.EQUIVALENT)
        else report
        for report, is_open in zip(reports, open_ones, strict=True)
    )
    worst = min(verdict.judgement, result, key=_WORST_FIRST.index)
    return _judged(verdict, worst, doubts), tuple(marked)


def _judged(verdict: Verdict, judgement: Judgement, reasons: Collection[str]) -> Verdict:
    """The verdict as it is for further reasons: no tolerance would make it equivalent."""
    return replace(
        verdict,
        judgement=judgement,
        smallest_tolerance=None,
        reasons=(*verdict.reasons, *reasons),
    )


def differing(verdict: Verdict, reasons: Collection[str]) -> Verdict:
    """The verdict where something besides the numbers is another thing than it should be."""
    return _judged(verdict, Judgement.DIFFERENT, reasons) if reasons else verdict
