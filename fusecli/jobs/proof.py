"""Proving a written artifact: with the model, by running it; without, group by group on stand-ins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fusecli.artifact import lent, load_into, without_numbers
from fusecli.checkpoint import Checkpoint
from fusecli.consent import Consent
from fusecli.graph.dataflow import Recording
from fusecli.graph.materialise import duplicate, in_eval_mode
from fusecli.graph.record import Run
from fusecli.jobs.fold import Fold, extra_state
from fusecli.jobs.in_memory import as_checkpoint
from fusecli.jobs.source import Source
from fusecli.outcome import GroupReport, Judgement, Verdict
from fusecli.proof.compare import TOLERANCE, compare
from fusecli.proof.groups import GroupCheck
from fusecli.proof.prove import Subject, judge
from fusecli.proof.run import run
from fusecli.proof.stored import same_bits
from fusecli.rewrite import ModuleTree
from fusecli.sample import Sample

Tick = Callable[[str], None]


@dataclass(frozen=True)
class Proof:
    """How a proof is run: samples with their seed, whom to tell about progress, and for each tensor of a
    sample the axes that may have other sizes (None: any)."""

    samples: Sequence[Sample]
    seed: int
    consent: Consent
    tick: Tick
    dynamic: Sequence[tuple[int, ...] | None] = ()


def prove_with_model(fold: Fold, artifact: Checkpoint, proof: Proof) -> tuple[Verdict, list[GroupCheck]]:
    """Loads the artifact into a fresh model as a user would and judges it against the original."""
    source = fold.source
    lend = _untouched(fold)

    def load() -> nn.Module:
        assert source.build is not None
        build = source.build

        def into(fresh: nn.Module, *, lend: bool) -> nn.Module:
            return in_eval_mode(load_into(fresh, artifact, lambda: proof.consent, lend=lend))

        if lend and (model := lent(lambda: into(without_numbers(build), lend=True))) is not None:
            return model
        return into(build(), lend=False)

    def record(sample: Sample) -> Recording:
        return Run(source.skeleton(), sample, source.runnable).recording

    subject = replace(
        _subject(fold, artifact),
        build=lambda: source.original(lend=lend),
        load=load,
        record=record,
        trains=_trains(source),
    )
    verdict, checks = judge(
        subject, proof.samples, seed=proof.seed, progress=proof.tick, dynamic=proof.dynamic
    )
    stored = verdict.check_results["from disk"] is Judgement.EQUIVALENT
    only_the_whole = stored and not any(check.judgement is Judgement.DIFFERENT for check in checks)
    if verdict.judgement is Judgement.DIFFERENT and only_the_whole and _builds_disagree(source, proof):
        verdict = _undetermined(verdict)
    return _with_learned(verdict, mislearned(fold, artifact)), checks


def _subject(fold: Fold, artifact: Checkpoint) -> Subject:
    source = fold.source
    return Subject(
        groups=fold.decisions,
        member=lambda path: source.member(path, fold.modules[path]),
        before=source.checkpoint.tensors,
        after=artifact.tensors,
        key=fold.keymap,
        expected=fold.layout.keys(),
        extra=(extra_state(fold), artifact.others),
    )


def _trains(source: Source) -> bool:
    return source.vocabulary.mode == "qat"


def prove_in_memory(
    fold: Fold, original: nn.Module, fused: nn.Module, sample: Sample, seed: int
) -> tuple[Verdict, list[GroupCheck]]:
    """Judges a fold of a model in memory; neither model is changed."""
    structure = fold.skeleton

    def record(sample: Sample) -> Recording:
        return Run(structure, sample, lambda: duplicate(structure)).recording

    lend = _untouched(fold)
    state = fused.state_dict()
    artifact = as_checkpoint(fused)
    others = {name: value for name, value in state.items() if name not in artifact.tensors}
    kept = {
        name: value
        for name, value in original.state_dict().items()
        if name not in fold.source.checkpoint.tensors
    }
    subject = replace(
        _subject(fold, artifact),
        extra=({new: v for name, v in kept.items() if (new := fold.keymap(name)) is not None}, others),
        member=ModuleTree(original).__getitem__,
        made=ModuleTree(fused).__getitem__,
        build=lambda: _copied(original, lend=lend),
        load=lambda: _copied(fused, lend=lend),
        record=record,
        trains=_trains(fold.source),
    )
    return judge(subject, [sample], seed=seed)


def _with_learned(verdict: Verdict, wrong: list[str]) -> Verdict:
    if not wrong:
        return verdict
    said = f"learned scales are not those of the checkpoint: {', '.join(wrong[:3])}"
    return replace(
        verdict,
        judgement=Judgement.DIFFERENT,
        smallest_tolerance=None,
        reasons=(*verdict.reasons, said),
        checks={**verdict.checks, "from disk": said},
        check_results={**verdict.check_results, "from disk": Judgement.DIFFERENT},
    )


def _builds_disagree(source: Source, proof: Proof) -> bool:
    """Whether two fresh models with the same checkpoint compute different things: then what was built beside
    the tensors decides, and no artifact can hold it."""
    sample, seed = proof.samples[0], proof.seed
    outputs = [run(source.original().double(), sample, seed=seed, dtype=torch.float64) for _ in range(2)]
    return compare(*outputs).error > TOLERANCE


def _undetermined(verdict: Verdict) -> Verdict:
    reason = "two builds of the factory with this checkpoint disagree: its tensors do not determine the model"
    return replace(
        verdict,
        judgement=Judgement.INCONCLUSIVE,
        smallest_tolerance=None,
        reasons=(reason,),
        check_results={
            **verdict.check_results,
            "semantic": Judgement.INCONCLUSIVE,
            "drift": Judgement.INCONCLUSIVE,
        },
    )


def _untouched(fold: Fold) -> bool:
    """Whether a run has shown that forward does not write to what the model holds: then those who only run it
    need no copy of its parameters."""
    recordings = (decision.region.recording for decision in fold.decisions if decision.region is not None)
    recording = next(recordings, None)
    return recording is not None and not recording.written and fold.source.vocabulary.mode == "folded"


def _copied(model: nn.Module, *, lend: bool) -> nn.Module:
    """A copy in eval mode; with `lend` it has the very parameters of `model`: nobody may write to them."""
    own = {id(p): p for p in model.parameters()} if lend else {}
    return in_eval_mode(duplicate(model, own))


def prove_alone(fold: Fold, artifact: Checkpoint, proof: Proof) -> tuple[Verdict, list[GroupCheck]]:
    """Judges each group by itself on random input; all other tensors have to be the original's own bits."""
    verdict, checks = judge(_subject(fold, artifact), seed=proof.seed, progress=proof.tick)
    return _with_learned(verdict, mislearned(fold, artifact)), checks


def mislearned(fold: Fold, artifact: Checkpoint) -> list[str]:
    """Keys of learned scales and zero points that the artifact has not got as they are."""
    return [
        name
        for name, tensor in fold.learned.tensors.items()
        if name not in artifact.tensors or not same_bits(tensor, artifact.tensors[name].load())
    ]


def reported(reports: Sequence[GroupReport], checks: Sequence[GroupCheck]) -> tuple[GroupReport, ...]:
    """The structural facts of each group with the numbers that the proof measured."""
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
