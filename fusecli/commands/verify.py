"""`verify` on files: proves an artifact again from the checkpoint, the artifact and its manifest.

With a spec the model is run; without one each group is judged by itself on stand-ins, with what the manifest
says of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from fusecli.artifact import artifact_at, manifest_of, require_mode
from fusecli.checkpoint import Checkpoint, open_checkpoint
from fusecli.commands.int8_facts import facts_in, facts_inside
from fusecli.commands.verify_blame import NO_RELEASE, blamed, misfit, mismatches, telling_which
from fusecli.commands.verify_int8 import Int8Request, verify_int8
from fusecli.consent import Consent
from fusecli.engine import Group, Vocabulary, rules_in
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.outcome import LedgerEntry, Outcome
from fusecli.pipeline import facts
from fusecli.pipeline.fold import Fold, Progress, Refused, edited_structure, plan_fold, trained_record
from fusecli.pipeline.outcome import VERIFIED, differing, recorded, totals_before, unlisted_norms, weighed
from fusecli.pipeline.prove import Trials, prove, trials_of
from fusecli.pipeline.record import record, seen
from fusecli.pipeline.select import Selection, select
from fusecli.rewrite import (
    MANIFEST_KEY,
    Container,
    Manifest,
    Opaque,
    Own,
    Plain,
    Remainder,
    TrainedRecord,
)
from fusecli.rules import all_rules
from fusecli.source.resolve import source_of
from fusecli.source.samples import as_computed
from fusecli.source.source import Source, Structure
from fusecli.source.stand_ins import stand_ins
from fusecli.source.trained import read_as, read_trained
from fusecli.spec import Spec


@dataclass(frozen=True)
class VerifyRequest:
    """One call of `fusecli verify`."""

    checkpoint: Path
    fused: Path
    spec: Spec | None = None
    strict: bool = False
    allow_pickle: bool = False
    seed: int | None = None
    samples: int | None = None

    def of_int8(self, said: Mapping[str, Any]) -> Int8Request:
        """The same for an int8 file, which says this of itself."""
        return Int8Request(self.checkpoint, self.fused, said, self.spec, self.allow_pickle, self.seed)


def verify_file(request: VerifyRequest, consent: Consent, progress: Progress = lambda _: None) -> Outcome:
    """The verdict on the artifact; raises UsageError and UnsafeError where the files cannot be judged."""
    progress("opening the files")
    if (said := facts_inside(request.fused)) is not None:
        return verify_int8(request.of_int8(said), consent, progress)
    with open_checkpoint(request.fused) as artifact:
        if (said := facts_in(artifact)) is not None:
            return verify_int8(request.of_int8(said), consent, progress)
        manifest = _manifest(request, artifact)
        with _original(request, manifest, consent) as checkpoint:
            told: list[LedgerEntry] = []
            if request.spec is not None:
                spec, told = as_computed(request.spec, checkpoint)
                request = replace(request, spec=spec)
            work = _Verify(request, manifest, artifact, consent, progress)
            source, structure = work.resolved(checkpoint)
            return work.outcome(replace(source, ledger=(*source.ledger, *told)), structure)


def _manifest(request: VerifyRequest, artifact: Checkpoint) -> Manifest:
    try:
        return manifest_of(artifact)
    except UsageError:
        if artifact_at(request.checkpoint) is not None:
            raise _no_original(request) from None
        raise


def _original(request: VerifyRequest, manifest: Manifest, consent: Consent) -> Checkpoint:
    try:
        checkpoint = open_checkpoint(
            request.checkpoint,
            allow_pickle=request.allow_pickle,
            key=manifest.key or None,
            strip_prefix=manifest.strip_prefix,
            consent=consent,
        )
    except UsageError:
        if artifact_at(request.checkpoint) is not None:
            raise _no_original(request) from None
        raise
    if MANIFEST_KEY in checkpoint.metadata:
        fused_to_train = manifest_of(checkpoint).mode == "qat"
        if not (fused_to_train and manifest.trained is not None):
            raise _no_original(request)
    return checkpoint


def _no_original(request: VerifyRequest) -> UsageError:
    what = "is an artifact of fusecli, not the checkpoint that one was made from"
    return UsageError(
        Problem(what, str(request.checkpoint), "give the original first: fusecli verify CHECKPOINT FUSED")
    )


def _require_modules(paths: Iterable[str], model: nn.Module, fused: Path) -> None:
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    strange = [path for path in paths if path not in known]
    if strange:
        fix = "build the model that the artifact was made from, or fuse again"
        raise UsageError(
            Problem(f"its edits speak of {strange[0]}, which the model has not", str(fused), fix)
        )


@dataclass(frozen=True)
class _Verify:
    """One proof of an artifact: what was done, by its manifest, and whether it is right."""

    request: VerifyRequest
    manifest: Manifest
    artifact: Checkpoint
    consent: Consent
    progress: Progress

    @cached_property
    def groups(self) -> list[Group]:
        return [Group(g.planned, hints=g.hints, rules=rules_in(g.rule)) for g in self.manifest.groups]

    @property
    def spec(self) -> Spec:
        return self.request.spec or Spec()

    def resolved(self, checkpoint: Checkpoint) -> tuple[Source, Structure]:
        """The checkpoint as it was fused, and the model without numbers; raises UsageError."""
        spec, manifest, fused = self.request.spec, self.manifest, self.artifact.path
        _require_adapter(spec, manifest, fused)
        if self.spec.qat:
            require_mode(manifest, "qat", str(fused))
        source = Source(checkpoint)
        own = tuple(dict.fromkeys(edit.path for edit in manifest.edits if isinstance(edit, Own)))
        bakes = {edit.path: "bake" for edit in manifest.edits if isinstance(edit, Plain)}
        if spec is not None or checkpoint.module is not None:
            source = source_of(checkpoint, self.spec, self.consent)
            # What was done is judged, not whether this spec would do it.
            vocabulary = replace(source.vocabulary, rules=None, mode=manifest.mode)
            bakes |= _adapted(source)
            source = replace(source, unshared=own, bakes=bakes, vocabulary=vocabulary)
        source = self._read_trained(source)
        known = {rule.name for rule in all_rules(manifest.mode) if rule.listed} | {"bake", "lora"}
        unlisted = [group.modules[0] for group in manifest.groups if not rules_in(group.rule) <= known]
        if source.build is not None:
            if spec is None and unlisted:
                what = f"{', '.join(unlisted[:3])} cannot be judged without a run of the model"
                raise UsageError(Problem(what, str(fused), "give --spec, with the inputs to run it on"))
            return source, self._built(source, checkpoint)
        return self._of_stand_ins(source, unlisted, own, bakes)

    def _built(self, source: Source, checkpoint: Checkpoint) -> Structure:
        assert source.build is not None
        named = (path for group in self.groups for path in group.modules)
        try:
            _require_modules([*source.bakes, *named], source.build(), self.artifact.path)
            return source.structure()
        except UsageError as error:
            raise telling_which(error, checkpoint, self.artifact, self.manifest) from error

    def _of_stand_ins(
        self, source: Source, unlisted: Sequence[str], own: tuple[str, ...], bakes: Iterable[str]
    ) -> tuple[Source, Structure]:
        edits = self.manifest.edits
        blind = [edit.path for edit in edits if isinstance(edit, Opaque | Remainder)]
        blind += [*unlisted, *(path for path in bakes if path not in _adapted(source))]
        if blind:
            what = f"{', '.join(blind[:3])} cannot be judged without the model's code"
            fix = "give --spec, whose model.factory builds the model"
            raise UsageError(Problem(what, str(self.artifact.path), fix))
        relus = {edit.members[-1]: nn.ReLU() for edit in edits if isinstance(edit, Container)}
        vocabulary = Vocabulary(mode=self.manifest.mode)
        plain = replace(source, vocabulary=vocabulary, unshared=own, bakes={})
        made, structure = stand_ins(plain, self.groups, {}, relus)
        return replace(made, ledger=source.ledger), structure

    def _read_trained(self, source: Source) -> Source:
        manifest, checkpoint = self.manifest, source.checkpoint
        if manifest.trained is None:
            return source
        if MANIFEST_KEY in checkpoint.metadata:
            return read_trained(source, self.spec, manifest_of(checkpoint))
        # Of a norm that was folded the artifact has no tensor: it is a module of a group.
        folded = {f"{path}.weight" for group in manifest.groups for path in group.modules}
        return read_as(source, self.spec, manifest.trained.norms, self.artifact.tensors.keys() | folded)

    def outcome(self, source: Source, structure: Structure) -> Outcome:
        request, manifest, artifact = self.request, self.manifest, self.artifact
        trials = trials_of(source, request.spec, request.seed, request.samples)
        selection = self._selected(source, structure, trials)
        outcome = Outcome(
            "verify",
            "different",
            ExitCode.DIFFERENT,
            input=facts.input_facts(source.checkpoint),
            output=facts.output_facts(request.fused, artifact),
            spec=facts.spec_facts(request.spec) if request.spec else None,
            totals_before=totals_before(selection),
            environment=facts.environment(),
        )
        try:
            fold = plan_fold(source, structure, self.groups, selection.run)
        except Refused as no:
            problem, fix = misfit(source, manifest)
            said = tuple(mismatches(source, manifest))
            return replace(outcome, refused=no.refused, problems=(problem,), next_step=fix, ledger=said)
        proof = prove(fold, artifact, trials, self.consent, self.progress)
        model, lost = edited_structure(fold)
        ledger = (
            *source.ledger,
            *facts.unshared_ledger(source.unshared),
            *lost,
            *facts.path_ledger(fold.decisions),
            *mismatches(source, manifest),
            *facts.caveat_ledger(fold.decisions, seen(selection.run)),
        )
        made = weighed(proof, model, ledger=ledger, strict=request.strict)
        unlike = tuple(_unlike(fold, manifest))
        verdict = differing(made.verdict, unlike)
        status, code = VERIFIED[verdict.judgement]
        whole = model if source.build is not None else None
        outcome = replace(
            outcome,
            status=status,
            exit_code=code,
            groups=verdict.groups,
            recording=recorded(selection),
            unfused=selection.unfused(fold.decisions) + unlisted_norms(selection),
            totals_after=facts.totals(facts.layout_of(artifact), whole),
            ledger=made.ledger,
            verification=verdict,
            peak_memory=facts.peak_memory(),
            next_step=_next(request, whole, code),
        )
        return blamed(outcome, source, manifest, unlike) if code is ExitCode.DIFFERENT else outcome

    def _selected(self, source: Source, structure: Structure, trials: Trials) -> Selection:
        """What the manifest lists, beside what a run offers."""
        run = None
        if trials.samples:
            run = record(source, structure, trials.samples[0], lambda: trials.samples[1:])
        selection = select(self.spec, source, structure, run, self.groups)
        if run is not None and selection.offer is not None:
            source.require_unwritten(run.recording)
        return selection


def _adapted(source: Source) -> dict[str, str]:
    return dict.fromkeys(source.adapter.pairs if source.adapter else (), "lora")


def _require_adapter(spec: Spec | None, manifest: Manifest, fused: Path) -> None:
    """Without its adapter a checkpoint is another model than the one that the artifact was made from."""
    named = spec is not None and spec.adapter is not None
    if manifest.adapter_sha256 and not named:
        what = (
            f"an adapter is part of its weights (sha256 {manifest.adapter_sha256[:12]}...), and none is given"
        )
        raise UsageError(Problem(what, str(fused), "give --spec, with the adapter that it was fused with"))
    if named and not manifest.adapter_sha256:
        assert spec is not None
        fix = "verify it with a spec without one, or fuse again"
        raise UsageError(Problem("no adapter is part of this artifact", spec.where(("adapter",)), fix))


def _unlike(fold: Fold, manifest: Manifest) -> Iterator[str]:
    """What the manifest says and the checkpoint does not."""
    if fold.edits != manifest.edits:
        yield "the manifest's edits are not those of its groups"
    if _learned(_as_noted(trained_record(fold), manifest.trained)) != _learned(manifest.trained):
        yield "what the manifest says was trained is not what the checkpoint holds"
    told = {group.planned: group.hints for group in manifest.groups}
    for decision, hints in zip(fold.decisions, fold.hints, strict=True):
        eps = told.get(decision.members, {}).get("eps")
        if fold.source.build is not None and eps is not None and eps != hints.get("eps"):
            yield f"{' + '.join(decision.members)}: the manifest's eps is {eps:g}, the model's is not"


def _learned(record: TrainedRecord | None) -> object:
    """The record without an order: the file may have been saved again, its tensors in another one."""
    if record is None:
        return None
    return record.layout, dict(record.norms), {q.of: q for q in record.quantizers}


def _as_noted(record: TrainedRecord | None, manifest: TrainedRecord | None) -> TrainedRecord | None:
    """The record without the integers that an earlier fusecli has not noted."""
    silent = {q.of for q in manifest.quantizers if q.integers is None} if manifest is not None else set()
    if record is None or not silent:
        return record
    told = (replace(q, integers=None) if q.of in silent else q for q in record.quantizers)
    return replace(record, quantizers=tuple(told))


def _next(request: VerifyRequest, model: nn.Module | None, code: ExitCode) -> str:
    if code is ExitCode.DIFFERENT:
        return NO_RELEASE
    if model is None and request.spec is None:
        return "add --spec fuse.yaml to run the model too, end to end"
    return ""
