"""Proving a fold: in memory, or as it is written; with the model by running it, without group by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fusecli.artifact import lent, load_into, without_numbers
from fusecli.checkpoint import Checkpoint
from fusecli.consent import Consent
from fusecli.errors import UsageError
from fusecli.graph.dataflow import Recording
from fusecli.graph.materialise import duplicate, in_eval_mode
from fusecli.graph.record import Run
from fusecli.outcome import Judgement, Refusal, Verdict
from fusecli.pipeline.fold import Fold, Progress, extra_state
from fusecli.pipeline.record import record
from fusecli.proof.compare import TOLERANCE, compare
from fusecli.proof.groups import GroupCheck
from fusecli.proof.prove import Subject, judge
from fusecli.proof.run import run
from fusecli.proof.stored import same_bits
from fusecli.proof.streamed import ROOM
from fusecli.rewrite import ModuleTree
from fusecli.sample import Sample
from fusecli.source.resolve import as_checkpoint
from fusecli.source.samples import dynamic_axes, samples_of
from fusecli.source.source import Source
from fusecli.spec import Spec
from fusecli.spec.model import Verify as VerifySpec


@dataclass(frozen=True)
class Proof:
    """The verdict on a fold, and what was seen of each of its groups."""

    fold: Fold
    verdict: Verdict
    checks: Sequence[GroupCheck]

    @property
    def failures(self) -> list[Refusal]:
        """The groups that it has found different, as what is left out."""
        if self.verdict.judgement is not Judgement.DIFFERENT:
            return []
        return [
            Refusal(d.group.modules, "dropped", f"it failed verification: {check.why}", d.rule)
            for d, check in zip(self.fold.decisions, self.checks, strict=True)
            if check.judgement is Judgement.DIFFERENT
        ]


@dataclass(frozen=True)
class Trials:
    """How a proof is run: the samples with their seed, for each tensor of a sample the axes that may have
    other sizes (None: any), and the bytes that are kept of float64 weights."""

    samples: Sequence[Sample] = ()
    seed: int = 0
    dynamic: Sequence[tuple[int, ...] | None] = ()
    room: int = ROOM


def trials_of(source: Source, spec: Spec | None, seed: int | None = None, count: int | None = None) -> Trials:
    """Those that the spec describes, where there is a model to run; `seed` and `count` are other ones than it
    says. Raises UsageError where it describes none."""
    asked = spec.verify if spec is not None else VerifySpec()
    seed = seed if seed is not None else asked.seed
    if spec is None or source.build is None:
        return Trials(seed=seed, room=room_of(spec))
    samples = samples_of(spec, seed, count if count is not None else asked.samples)
    return Trials(samples, seed, dynamic_axes(spec, samples[0]), room_of(spec))


def room_of(spec: Spec | None) -> int:
    """The bytes that a proof may keep of float64 weights."""
    asked = spec.verify.memory if spec is not None else None
    return ROOM if asked is None else asked


def prove(
    fold: Fold, artifact: Checkpoint, trials: Trials, consent: Consent, progress: Progress = lambda _: None
) -> Proof:
    """Judges a written fold: against the original as it runs, where there are samples for it; else each group
    by itself on random input, and all other tensors have to be the original's own bits."""
    if fold.source.build is None or not trials.samples:
        subject = _subject(fold, artifact)
        verdict, checks = judge(subject, seed=trials.seed, progress=progress, room=trials.room)
        return Proof(fold, _with_learned(verdict, mislearned(fold, artifact)), checks)
    lend = _untouched(fold)
    try:
        verdict, checks = _run(fold, artifact, trials, consent, progress, lend=lend)
    except UsageError:
        if not lend:
            raise
        # Something of the model keeps what its constructor has made of a parameter.
        verdict, checks = _run(fold, artifact, trials, consent, progress, lend=False)
    stored = verdict.check_results["from disk"] is Judgement.EQUIVALENT
    only_the_whole = stored and not any(check.judgement is Judgement.DIFFERENT for check in checks)
    if verdict.judgement is Judgement.DIFFERENT and only_the_whole and _builds_disagree(fold, trials):
        verdict = _undetermined(verdict)
    return Proof(fold, _with_learned(verdict, mislearned(fold, artifact)), checks)


def _run(
    fold: Fold, artifact: Checkpoint, trials: Trials, consent: Consent, progress: Progress, *, lend: bool
) -> tuple[Verdict, list[GroupCheck]]:
    """Loads the artifact into a fresh model as a user would and judges it against the original."""
    source = fold.source
    build = source.build
    assert build is not None

    def into(fresh: nn.Module, *, lend: bool) -> nn.Module:
        return in_eval_mode(load_into(fresh, artifact, lambda: consent, lend=lend))

    def load() -> nn.Module:
        if lend and (model := lent(lambda: into(without_numbers(build), lend=True))) is not None:
            return model
        return into(build(), lend=False)

    subject = replace(
        _subject(fold, artifact),
        build=lambda: source.original(lend=lend),
        load=load,
        record=lambda sample: record(source, source.structure(), sample).recording,
        trains=source.vocabulary.mode == "qat",
    )
    return judge(
        subject,
        trials.samples,
        seed=trials.seed,
        progress=progress,
        dynamic=trials.dynamic,
        room=trials.room,
    )


def prove_in_memory(fold: Fold, fused: nn.Module, trials: Trials) -> Proof:
    """Judges a fold of a model in memory; neither model is changed."""
    structure, original = fold.structure.model, fold.structure.original
    assert original is not None

    def record(sample: Sample) -> Recording:
        return Run(structure, sample, lambda: duplicate(structure)).recording

    lend = _untouched(fold)
    artifact = as_checkpoint(fused)
    stored = fold.source.checkpoint.tensors
    kept = {name: value for name, value in original.state_dict().items() if name not in stored}
    others = {name: value for name, value in fused.state_dict().items() if name not in artifact.tensors}
    subject = replace(
        _subject(fold, artifact),
        extra=({new: v for name, v in kept.items() if (new := fold.keymap(name)) is not None}, others),
        made=ModuleTree(fused).__getitem__,
        build=lambda: _copied(original, lend=lend),
        load=lambda: _copied(fused, lend=lend),
        record=record,
        trains=fold.source.vocabulary.mode == "qat",
    )
    return Proof(fold, *judge(subject, trials.samples, seed=trials.seed, room=trials.room))


def _subject(fold: Fold, artifact: Checkpoint) -> Subject:
    return Subject(
        groups=fold.decisions,
        member=fold.member,
        before=fold.source.checkpoint.tensors,
        after=artifact.tensors,
        key=fold.keymap,
        expected=fold.layout.keys(),
        extra=(extra_state(fold), artifact.others),
    )


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


def mislearned(fold: Fold, artifact: Checkpoint) -> list[str]:
    """Keys of learned scales and zero points that the artifact has not got as they are."""
    return [
        name
        for name, tensor in fold.learned.tensors.items()
        if name not in artifact.tensors or not same_bits(tensor, artifact.tensors[name].load())
    ]


def _builds_disagree(fold: Fold, trials: Trials) -> bool:
    """Whether two fresh models with the same checkpoint compute different things: then what was built beside
    the tensors decides, and no artifact can hold it."""
    sample, seed = trials.samples[0], trials.seed
    build: Callable[[], nn.Module] = fold.source.original
    outputs = [run(build().double(), sample, seed=seed, dtype=torch.float64) for _ in range(2)]
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
