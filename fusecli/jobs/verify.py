"""`verify` on files: proves an artifact again from the checkpoint, the artifact and its manifest.

With a spec the model is run; without one each group is judged by itself on stand-ins, with what the manifest
says of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from fusecli.artifact import artifact_at, manifest_of, require_mode
from fusecli.checkpoint import Checkpoint, open_checkpoint
from fusecli.consent import Consent
from fusecli.engine import Group, Vocabulary, rules_in
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.graph.record import Run
from fusecli.jobs import facts
from fusecli.jobs.choice import chosen
from fusecli.jobs.fold import Fold, Refused, apply_to_skeleton, group_reports, plan_fold, trained_record
from fusecli.jobs.inputs import as_computed, samples_of
from fusecli.jobs.int8_facts import facts_of
from fusecli.jobs.proof import reported
from fusecli.jobs.source import Source, dressed, planted, source_of
from fusecli.jobs.trained import read_as, read_trained
from fusecli.jobs.verdicts import judged, on_all_paths, recorded, strictly
from fusecli.jobs.verify_blame import NO_RELEASE, blamed, misfit, mismatches, telling_which
from fusecli.jobs.verify_int8 import Int8Request, verify_int8
from fusecli.outcome import Judgement, LedgerEntry, Outcome
from fusecli.rewrite import (
    MANIFEST_KEY,
    Container,
    Manifest,
    ModuleTree,
    Opaque,
    Own,
    Plain,
    Remainder,
    TrainedRecord,
)
from fusecli.rules import all_rules
from fusecli.spec import Spec

_STATUS = {
    Judgement.EQUIVALENT: ("verified", ExitCode.OK),
    Judgement.DIFFERENT: ("different", ExitCode.DIFFERENT),
    Judgement.INCONCLUSIVE: ("inconclusive", ExitCode.INCONCLUSIVE),
}


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


def verify_file(
    request: VerifyRequest, consent: Consent, tick: Callable[[str], None] = lambda _: None
) -> Outcome:
    """The verdict on the artifact; raises UsageError and UnsafeError where the files cannot be judged."""
    spec = request.spec
    tick("opening the files")
    if (said := facts_of(request.fused)) is not None:
        again = Int8Request(request.checkpoint, request.fused, said, spec, request.allow_pickle, request.seed)
        return verify_int8(again, consent, tick)
    with open_checkpoint(request.fused) as artifact:
        manifest = _manifest(request, artifact)
        with _original(request, manifest, consent) as checkpoint:
            typed: list[LedgerEntry] = []
            if spec is not None:
                spec, typed = as_computed(spec, checkpoint)
                request = replace(request, spec=spec)
            source, skeleton, groups = _structure(checkpoint, spec, manifest, consent, artifact)
            source.ledger += typed
            return _verify(request, spec, source, skeleton, groups, manifest, artifact, consent, tick)


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


def _structure(
    checkpoint: Checkpoint, spec: Spec | None, manifest: Manifest, consent: Consent, artifact: Checkpoint
) -> tuple[Source, nn.Module, list[Group]]:
    fused = artifact.path
    groups = [Group(g.planned, hints=g.hints, rules=rules_in(g.rule)) for g in manifest.groups]
    owns = list(dict.fromkeys(edit.path for edit in manifest.edits if isinstance(edit, Own)))
    bakes = {edit.path: "bake" for edit in manifest.edits if isinstance(edit, Plain)}
    source = Source(checkpoint, None)
    _require_adapter(spec, manifest, fused)
    if spec is not None and spec.qat:
        require_mode(manifest, "qat", str(fused))
    if spec is not None or checkpoint.module is not None:
        source = source_of(checkpoint, spec or Spec(), consent)
        source.owns, source.bakes = owns, {**bakes, **_adapted(source)}
        # What was done is judged, not whether this spec would do it.
        source.vocabulary = replace(source.vocabulary, rules=None, mode=manifest.mode)
    _read_trained(source, spec or Spec(), manifest, artifact)
    known = {rule.name for rule in all_rules(manifest.mode) if rule.listed} | {"bake", "lora"}
    unlisted = [group.modules[0] for group in manifest.groups if not rules_in(group.rule) <= known]
    if source.build is not None:
        if spec is None and unlisted:
            what = f"{', '.join(unlisted[:3])} cannot be judged without a run of the model"
            raise UsageError(Problem(what, str(fused), "give --spec, with the inputs to run it on"))
        named = (path for group in groups for path in group.modules)
        try:
            _require_modules([*bakes, *named], source.build(), fused)
            return source, source.skeleton(), groups
        except UsageError as error:
            raise telling_which(error, checkpoint, artifact, manifest) from error
    blind = [edit.path for edit in manifest.edits if isinstance(edit, Opaque | Remainder)]
    blind += unlisted
    blind += bakes.keys() - _adapted(source).keys()
    if blind:
        what = f"{', '.join(blind[:3])} cannot be judged without the model's code"
        raise UsageError(Problem(what, str(fused), "give --spec, whose model.factory builds the model"))
    relus = {edit.members[-1]: nn.ReLU() for edit in manifest.edits if isinstance(edit, Container)}
    skeleton, _ = planted(source.checkpoint, groups, {}, relus)
    plain = Source(source.checkpoint, None, Vocabulary(mode=manifest.mode), source.ledger, owns)
    plain.adapter, plain.trained = source.adapter, source.trained
    dressed(plain, skeleton)
    return plain, skeleton, groups


def _read_trained(source: Source, spec: Spec, manifest: Manifest, artifact: Checkpoint) -> None:
    if manifest.trained is None:
        return
    checkpoint = source.checkpoint
    if MANIFEST_KEY in checkpoint.metadata:
        read_trained(source, spec, manifest_of(checkpoint))
    else:
        # Of a norm that was folded the artifact has no tensor: it is a module of a group.
        folded = {f"{path}.weight" for group in manifest.groups for path in group.modules}
        read_as(source, spec, manifest.trained.norms, artifact.tensors.keys() | folded)


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


def _verify(
    request: VerifyRequest,
    spec: Spec | None,
    source: Source,
    skeleton: nn.Module,
    groups: list[Group],
    manifest: Manifest,
    artifact: Checkpoint,
    consent: Consent,
    tick: Callable[[str], None],
) -> Outcome:
    whole = skeleton if source.build is not None else None
    run = _run(request, source, skeleton)
    modules = dict(skeleton.named_modules())
    outcome = Outcome(
        "verify",
        "different",
        ExitCode.DIFFERENT,
        input=facts.input_facts(source.checkpoint),
        output=facts.output_facts(request.fused, artifact),
        spec=facts.spec_facts(spec) if spec else None,
        totals_before=facts.totals(facts.layout_of(source.checkpoint), whole),
        environment=facts.environment(),
    )
    try:
        fold = plan_fold(source, skeleton, groups, run)
    except Refused as no:
        problem, fix = misfit(source, manifest)
        said = tuple(mismatches(source, manifest))
        return replace(outcome, refused=no.refused, problems=(problem,), next_step=fix, ledger=said)
    choice = chosen(spec or Spec(), ModuleTree(skeleton), modules, groups, run, source.vocabulary)
    verdict, checks = judged(fold, artifact, spec, consent, tick, request.seed, request.samples)
    ledger = [
        *source.ledger,
        *facts.own_ledger(source.owns),
        *apply_to_skeleton(fold),
        *facts.path_ledger(fold.decisions),
        *mismatches(source, manifest),
        *facts.caveat_ledger(fold.decisions, facts.seen(run)),
        *verdict.ledger,
    ]
    verdict, reports = on_all_paths(
        verdict,
        reported(group_reports(fold, fold.skeleton), checks),
        fold.decisions,
        assumed=source.vocabulary.same_path,
    )
    outcome = replace(
        outcome,
        groups=reports,
        recording=recorded(run),
        unfused=choice.unfused(fold.decisions) + facts.norms_beyond(source.checkpoint, modules),
        totals_after=facts.totals(facts.layout_of(artifact), whole),
        ledger=tuple(ledger),
    )
    unlike = tuple(_unlike(fold, manifest))
    if unlike:
        verdict = replace(
            verdict,
            judgement=Judgement.DIFFERENT,
            reasons=(*verdict.reasons, *unlike),
            smallest_tolerance=None,
        )
    verdict = strictly(replace(verdict, groups=reports), outcome, request.strict)
    status, code = _STATUS[verdict.judgement]
    outcome = replace(
        outcome, verification=verdict, status=status, exit_code=code, next_step=_next(request, whole, code)
    )
    return blamed(outcome, source, manifest, unlike) if code is ExitCode.DIFFERENT else outcome


def _run(request: VerifyRequest, source: Source, skeleton: nn.Module) -> Run | None:
    if source.build is None or request.spec is None:
        return None
    seed = request.seed if request.seed is not None else request.spec.verify.seed
    spec = request.spec
    count = request.samples if request.samples is not None else spec.verify.samples
    first = samples_of(spec, seed, 1)[0]
    run = Run(skeleton, first, source.runnable, others=lambda: samples_of(spec, seed, count)[1:])
    source.require_unwritten(run)
    return run


def _unlike(fold: Fold, manifest: Manifest) -> Iterator[str]:
    """What the manifest says and the checkpoint does not."""
    if _edits(fold) != manifest.edits:
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


def _edits(fold: Fold) -> tuple[object, ...]:
    return tuple(edit for rewrite in fold.rewrites for edit in rewrite.edits)


def _next(request: VerifyRequest, model: nn.Module | None, code: ExitCode) -> str:
    if code is ExitCode.DIFFERENT:
        return NO_RELEASE
    if model is None and request.spec is None:
        return "add --spec fuse.yaml to run the model too, end to end"
    return ""
