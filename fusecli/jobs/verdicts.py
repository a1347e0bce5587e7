"""From a fold to its verdict: which proof the source allows, and what a verdict means for the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fusecli.checkpoint import Checkpoint
from fusecli.consent import Consent
from fusecli.engine import Decision
from fusecli.errors import ExitCode
from fusecli.graph.record import Run
from fusecli.jobs.fold import Fold
from fusecli.jobs.inputs import dynamic_axes, samples_of
from fusecli.jobs.proof import Proof, Tick, prove_alone, prove_with_model
from fusecli.outcome import Evidence, GroupReport, Judgement, Outcome, Refusal, Verdict
from fusecli.plain import some
from fusecli.proof.groups import GroupCheck
from fusecli.spec import Spec

STATUS = {
    Judgement.EQUIVALENT: ("fused", ExitCode.OK),
    Judgement.DIFFERENT: ("different", ExitCode.DIFFERENT),
    Judgement.INCONCLUSIVE: ("inconclusive", ExitCode.INCONCLUSIVE),
}


def judged(
    fold: Fold,
    artifact: Checkpoint,
    spec: Spec | None,
    consent: Consent,
    tick: Tick,
    seed: int | None,
    samples: int | None,
) -> tuple[Verdict, Sequence[GroupCheck]]:
    """The proof that the source allows: by running the model, or group by group."""
    asked = spec.verify if spec is not None else None
    seed = seed if seed is not None else asked.seed if asked else 0
    if fold.source.build is None or spec is None:
        return prove_alone(fold, artifact, Proof((), seed, consent, tick))
    count = samples if samples is not None else spec.verify.samples
    inputs = samples_of(spec, seed, count)
    proof = Proof(inputs, seed, consent, tick, dynamic_axes(spec, inputs[0]))
    return prove_with_model(fold, artifact, proof)


def strictly(verdict: Verdict, outcome: Outcome, strict: bool) -> Verdict:
    """With --strict, what is only claimed, assumed or lost makes a right fold inconclusive."""
    if not strict or verdict.judgement is not Judgement.EQUIVALENT:
        return verdict
    doubts = [
        f"--strict: {e.where}: {e.what}"
        for e in outcome.ledger
        if e.kind in ("hook", "assumed", "statistics")
    ]
    if any(group.evidence is Evidence.CLAIMED for group in outcome.groups):
        doubts.append("--strict: the groups are claimed by the spec, no run of the model has shown them")
    if not doubts:
        return verdict
    return replace(
        verdict,
        judgement=Judgement.INCONCLUSIVE,
        smallest_tolerance=None,
        reasons=(*verdict.reasons, *doubts),
    )


def on_all_paths(
    verdict: Verdict, reports: Sequence[GroupReport], decisions: Sequence[Decision], *, assumed: bool
) -> tuple[Verdict, tuple[GroupReport, ...]]:
    """A right fold is inconclusive where modules beside it were never run, which may need what it takes away;
    unless it is `assumed` that no input goes there."""
    open_ones = [bool(decision.unrun) for decision in decisions]
    if not any(open_ones):
        return verdict, tuple(reports)
    result = Judgement.EQUIVALENT if assumed else Judgement.INCONCLUSIVE
    said = f"{sum(open_ones)} of {len(decisions)} groups hold for inputs that go through the modules that ran"
    doubts = [
        f"{' + '.join(decision.members)}: no input ran {some(decision.unrun)} beside it; give inputs that "
        "do, or say --assume-same-path"
        for decision in decisions
        if decision.unrun
    ]
    ends = {verdict.judgement, result}
    worst = next(
        (j for j in (Judgement.DIFFERENT, Judgement.INCONCLUSIVE) if j in ends), Judgement.EQUIVALENT
    )
    verdict = replace(
        verdict,
        judgement=worst,
        smallest_tolerance=verdict.smallest_tolerance if assumed else None,
        checks={**verdict.checks, "paths": said},
        check_results={**verdict.check_results, "paths": result},
        reasons=verdict.reasons if assumed else (*verdict.reasons, *doubts),
    )
    doubted = str(Judgement.INCONCLUSIVE)
    marked = (
        replace(report, status=doubted)
        if open_one and not assumed and report.status == str(Judgement.EQUIVALENT)
        else report
        for report, open_one in zip(reports, open_ones, strict=True)
    )
    return verdict, tuple(marked)


def failures(fold: Fold, checks: Sequence[GroupCheck]) -> list[Refusal]:
    """The groups that the proof has found different, as what --keep-going leaves out."""
    return [
        Refusal(decision.group.modules, "dropped", f"it failed verification: {check.why}", decision.rule)
        for decision, check in zip(fold.decisions, checks, strict=True)
        if check.judgement is Judgement.DIFFERENT
    ]


def recorded(run: Run | None) -> str:
    """How the graph was recorded, for the report."""
    if run is None or "recording" not in vars(run):
        return ""
    recording = run.recording
    return f"{len(recording.calls):,} op calls of one forward"
