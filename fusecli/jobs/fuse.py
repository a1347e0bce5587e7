"""`fuse` on files: open, plan, fold into a staged file, prove that file, then put it in its place."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fusecli.artifact import artifact_at, manifest_of, require_mode
from fusecli.checkpoint import (
    Checkpoint,
    Staged,
    check_target,
    fits_in_text,
    is_plain,
    open_checkpoint,
    staged,
)
from fusecli.consent import Consent
from fusecli.engine import Decision, Group, needed
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.graph.dataflow import Recording
from fusecli.graph.kinds import LAYER_KINDS, is_norm, kind_of
from fusecli.graph.record import Run
from fusecli.jobs import facts
from fusecli.jobs.adapter import protected as adapter_files
from fusecli.jobs.choice import Choice, chosen, looked, shortfall
from fusecli.jobs.fold import (
    Fold,
    Refused,
    apply_to_skeleton,
    group_reports,
    manifest_for,
    plan_fold,
    write_fold,
)
from fusecli.jobs.inputs import as_computed, samples_of
from fusecli.jobs.proof import Tick, reported
from fusecli.jobs.rerun import edited_run
from fusecli.jobs.source import (
    Source,
    adapted_groups,
    dressed,
    groups_of,
    module_names,
    planted,
    source_of,
)
from fusecli.jobs.trained import may_be_trained, read_trained, require_folding, trained_groups
from fusecli.jobs.verdicts import STATUS, failures, judged, on_all_paths, recorded, strictly
from fusecli.outcome import LedgerEntry, Outcome, Refusal, Unfused, Verdict
from fusecli.plain import some
from fusecli.proof.groups import GroupCheck
from fusecli.rewrite import MANIFEST_KEY, Manifest, ModuleTree
from fusecli.sample import Sample
from fusecli.spec import Spec
from fusecli.spec.inputs import tensors_of


@dataclass(frozen=True)
class FuseRequest:
    """One call of `fusecli fuse`. None: the spec decides, or the default.

    typed    the words that named model and inputs on the command line, for the command that comes next
    trusted  the code that those words name
    """

    checkpoint: Path
    spec: Spec
    output: Path | None = None
    format: str | None = None
    force: bool = False
    dry_run: bool = False
    strict: bool = False
    allow_pickle: bool = False
    seed: int | None = None
    samples: int | None = None
    keep_going: bool = False
    require_all: bool = False
    min_folded: float | None = None
    typed: tuple[str, ...] = ()
    trusted: tuple[str, ...] = ()


def fuse_file(request: FuseRequest, consent: Consent, tick: Tick = lambda _: None) -> Outcome:
    """Does the whole job; nothing is at the target unless the verdict is `equivalent`.

    Raises UsageError, UnsafeError and RefusedError for what stops the work before there is a plan.
    """
    spec = request.spec
    fmt, target = _target(request, spec)
    check_target(target, request.checkpoint, request.force or request.dry_run, protected(spec))
    tick("opening the checkpoint")
    with _opened(request, spec, consent) as checkpoint:
        outcome = Outcome("fuse", "refused", ExitCode.REFUSED, spec=facts.spec_facts(spec))
        manifest = manifest_of(checkpoint) if MANIFEST_KEY in checkpoint.metadata else None
        if manifest is not None and manifest.mode == "folded":
            return _fused_already(outcome, checkpoint, manifest, spec)
        _require_storable(checkpoint, fmt)
        source = source_of(checkpoint, spec, consent)
        spec, typed = as_computed(spec, checkpoint)
        source.ledger += typed
        read_trained(source, spec, manifest)
        _require_work(spec, source)
        outcome = _Job(request, spec, source, consent, tick, fmt, target).run(outcome)
        return replace(outcome, input=facts.input_facts(source.checkpoint))


def _require_work(spec: Spec, source: Source) -> None:
    """Raises UsageError where neither the spec nor the checkpoint says what to fuse."""
    if source.trained is not None:
        require_folding(spec, source)
    elif spec.source is None and not (spec.discover or spec.groups):
        fix = "give --spec fuse.yaml, or --discover with --model and --input"
        if may_be_trained(source):
            fix += "; containers of quantization-aware training are known by the groups that name them"
        raise UsageError(Problem("nothing says what to fuse", str(source.checkpoint.path), fix))


def _opened(request: FuseRequest, spec: Spec, consent: Consent) -> Checkpoint:
    consented = partial(
        open_checkpoint, request.checkpoint, allow_pickle=request.allow_pickle, consent=consent
    )
    try:
        return consented(key=spec.checkpoint.key, strip_prefix=spec.checkpoint.strip_prefix)
    except UsageError:
        # What the spec says of the original does not hold for the artifact made of it: no nesting, no prefix.
        if (plain := artifact_at(request.checkpoint)) is not None:
            return plain
        raise


def _target(request: FuseRequest, spec: Spec) -> tuple[str, Path]:
    """The format and the path that is written; a format follows --format, the output's name, the spec."""
    by_name = {".pt": "pt", ".pth": "pt", ".safetensors": "safetensors"}
    named = by_name.get(request.output.suffix) if request.output else None
    fmt = request.format or named or spec.output.format or "safetensors"
    if request.output is not None:
        return fmt, request.output
    return fmt, request.checkpoint.parent / f"{request.checkpoint.stem}.fused.{fmt}"


def protected(spec: Spec) -> list[Path]:
    """Files besides the checkpoint that the work reads: the spec, its inputs, its code."""
    read = [entry.file for entry in tensors_of(spec.inputs) if entry.file]
    named = [spec.model.factory] if spec.model else []
    named += [extra.fuser for extra in spec.extra_mappings if extra.fuser]
    adapter = adapter_files(spec.adapter, spec.folder) if spec.adapter else []
    read += [source for source in (name.rpartition(":")[0] for name in named) if source.endswith(".py")]
    return [*filter(None, [spec.source]), *(spec.folder / file for file in read), *adapter]


def _fused_already(outcome: Outcome, checkpoint: Checkpoint, manifest: Manifest, spec: Spec) -> Outcome:
    if spec.qat:
        require_mode(manifest, "qat", str(checkpoint.path))
    groups = len(manifest.groups)
    return replace(
        outcome,
        status="nothing to fuse",
        exit_code=ExitCode.NOTHING,
        input=facts.input_facts(checkpoint),
        environment=facts.environment(),
        problems=(f"{checkpoint.path} is an artifact of fusecli: its {groups} groups are folded already",),
        next_step="to fuse other groups, start from the original checkpoint",
    )


def _require_storable(checkpoint: Checkpoint, fmt: str) -> None:
    """Raises UsageError for extra state that cannot be carried as it is."""
    where = str(checkpoint.path)
    odd = [name for name, value in checkpoint.others.items() if not is_plain(value)]
    if odd:
        what = f"{some(odd)} holds objects, which a file gives back by running code only"
        fix = "let get_extra_state return tensors, numbers, texts, lists and dicts"
        raise UsageError(Problem(what, where, fix))
    unlike = [name for name, value in checkpoint.others.items() if not fits_in_text(value)]
    if unlike and fmt == "safetensors":
        what = f"{some(unlike)} is no tensor, and more than the JSON that a safetensors file can hold"
        raise UsageError(Problem(what, where, "give --format pt, which stores it as it is"))


@dataclass
class _Job:
    """The steps of one fuse, and what they share."""

    request: FuseRequest
    spec: Spec
    source: Source
    consent: Consent
    tick: Tick
    fmt: str
    target: Path
    assumed: list[LedgerEntry] = field(default_factory=list)
    run_seen: Run | None = None

    def run(self, outcome: Outcome) -> Outcome:
        self.tick("planning")
        skeleton, asked = self._structure()
        outcome = replace(
            outcome,
            environment=facts.environment(),
            totals_before=facts.totals(facts.layout_of(self.source.checkpoint), self._model(skeleton)),
        )
        run: Run | None = None
        if self.source.build is None:
            modules = dict(skeleton.named_modules())
            choice = chosen(self.spec, ModuleTree(skeleton), modules, asked, None, self.source.vocabulary)
        else:
            skeleton, run, choice = looked(
                self.spec,
                self.source,
                self.source.skeleton,
                self.source.runnable,
                self._sample(),
                asked,
                others=self._others,
            )
        while True:
            self.run_seen = run
            outcome = replace(
                outcome,
                recording=recorded(run),
                totals_before=facts.with_ops(outcome.totals_before, facts.seen(run)),
            )
            try:
                fold = plan_fold(self.source, skeleton, choice.groups, run)
                # What was trained with simulated quantization is written as the float model that it is, with
                # its scales, folds or none.
                if not fold.decisions and self.source.trained is None:
                    return self._nothing(outcome, choice, bool(fold.done))
                if problems := self._shortfall(fold, choice):
                    return self._short(outcome, fold, choice, problems)
                outcome, checks = self._write(outcome, fold, choice)
            except Refused as no:
                if not choice.may_drop(no.refused) and not (self.request.keep_going and choice.dropped):
                    return self._refused(outcome, choice, no.refused)
                choice.drop(no.refused)
                continue
            failed = failures(fold, checks)
            wanted = self.request.keep_going or choice.may_drop(failed)
            if outcome.exit_code is not ExitCode.DIFFERENT or not (failed and wanted) or outcome.output:
                return outcome
            choice.drop(failed)
            skeleton, _ = self._structure()  # the other one has been edited
            choice.modules = dict(skeleton.named_modules())
            if run is not None:
                run.structure = skeleton

    def _structure(self) -> tuple[Any, list[Group]]:
        if self.source.build is not None:
            skeleton = self.source.skeleton()
            modules = dict(skeleton.named_modules(remove_duplicate=False))
            groups = groups_of(self.spec, [name for name in modules if name])
            if (trained := self.source.trained) is not None:
                kinds = {path: kind_of(modules[path]) for group in groups for path in group.modules}
                groups = trained_groups(
                    trained,
                    groups,
                    lambda path: is_norm(modules[path]),
                    lambda path: kinds[path] in LAYER_KINDS,
                    self.spec.exclude,
                )
            return skeleton, groups
        if self.spec.bake:
            fix = "give --model and --input, or model and inputs in the spec"
            where = self.spec.where(("bake",))
            raise UsageError(
                Problem("the model's code computes its weights, and it is not known", where, fix)
            )
        known = module_names(self.source.checkpoint)
        groups = groups_of(self.spec, known, optional_from=2)
        if (trained := self.source.trained) is not None:
            stored = self.source.checkpoint.tensors
            groups = trained_groups(
                trained,
                groups,
                lambda path: f"{path}.running_mean" in stored,
                lambda path: f"{path}.weight" in stored and f"{path}.running_mean" not in stored,
                self.spec.exclude,
            )
        groups += adapted_groups(self.source, groups)
        skeleton, assumed = planted(self.source.checkpoint, groups, dict(self.spec.assume))
        self.assumed = assumed
        dressed(self.source, skeleton)
        return skeleton, groups

    def _sample(self) -> Sample:
        seed = self.request.seed if self.request.seed is not None else self.spec.verify.seed
        return samples_of(self.spec, seed, 1)[0]

    def _others(self) -> Sequence[Sample]:
        """The samples of the proof but for the first."""
        seed = self.request.seed if self.request.seed is not None else self.spec.verify.seed
        count = self.request.samples if self.request.samples is not None else self.spec.verify.samples
        return samples_of(self.spec, seed, count)[1:]

    def _shortfall(self, fold: Fold, choice: Choice) -> list[str]:
        return self._missed(choice, choice.unfused(fold.decisions) + self._beyond(choice), fold.decisions)

    def _short(self, outcome: Outcome, fold: Fold, choice: Choice, problems: list[str]) -> Outcome:
        return replace(
            outcome,
            status="refused",
            exit_code=ExitCode.REFUSED,
            verification=None,
            refused=tuple(choice.dropped.values()),
            groups=tuple(group_reports(fold, self._edited(fold))),
            unfused=choice.unfused(fold.decisions) + self._beyond(choice),
            problems=tuple(problems),
            next_step="'fusecli plan' writes a spec that folds every norm that can be folded",
        )

    def _edited(self, fold: Fold) -> Any:
        apply_to_skeleton(fold)
        return fold.skeleton

    def _after(self, fold: Fold) -> Recording | None:
        """What the model will compute, as far as it can be run before it is written."""
        if self.run_seen is None or any(decision.custom for decision in fold.decisions):
            return None
        return edited_run(self.run_seen, fold.rewrites)

    def _model(self, skeleton: Any) -> Any:
        return skeleton if self.source.build is not None else None

    def _write(self, outcome: Outcome, fold: Fold, choice: Choice) -> tuple[Outcome, Sequence[GroupCheck]]:
        request, checkpoint = self.request, self.source.checkpoint
        manifest = partial(manifest_for, fold, versions=facts.versions())
        with staged(
            self.target, request.force or request.dry_run, request.checkpoint, protected(self.spec)
        ) as stage:
            write_fold(fold, stage.path, self.fmt, manifest, self.tick)
            ledger = self.assumed + self.source.ledger + facts.statistics_ledger(checkpoint, fold.members)
            ledger += fold.learned.ledger
            ledger += facts.tie_ledger(checkpoint, fold.layout.keys())
            ledger += facts.own_ledger(needed(self.source.owns, fold.decisions))
            ledger += facts.caveat_ledger(fold.decisions, facts.seen(self.run_seen))
            ledger += facts.path_ledger(fold.decisions)
            ledger += facts.bare_ledger(choice.bare)
            after = self._after(fold)
            ledger += apply_to_skeleton(fold)
            spared = tuple(no for decision in fold.decisions for no in decision.spared)
            outcome = replace(
                outcome,
                groups=tuple(group_reports(fold, fold.skeleton)),
                refused=(*choice.dropped.values(), *spared),
                unfused=choice.unfused(fold.decisions) + self._beyond(choice),
                totals_after=facts.with_ops(facts.totals(fold.layout, self._model(fold.skeleton)), after),
                ledger=tuple(ledger),
            )
            with open_checkpoint(stage.path) as artifact:
                verdict, checks = self._judge(fold, artifact)
                outcome = self._judged(outcome, fold, verdict, checks)
                outcome = replace(outcome, output=facts.output_facts(self.target, artifact))
            return self._finish(outcome, stage, choice), checks

    def _judged(
        self, outcome: Outcome, fold: Fold, verdict: Verdict, checks: Sequence[GroupCheck]
    ) -> Outcome:
        verdict, groups = on_all_paths(
            verdict,
            reported(outcome.groups, checks),
            fold.decisions,
            assumed=self.source.vocabulary.same_path,
        )
        verdict = strictly(replace(verdict, groups=groups), outcome, self.request.strict)
        status, code = STATUS[verdict.judgement]
        ledger = (*outcome.ledger, *verdict.ledger)
        return replace(
            outcome, groups=groups, verification=verdict, ledger=ledger, status=status, exit_code=code
        )

    def _judge(self, fold: Fold, artifact: Checkpoint) -> tuple[Verdict, Any]:
        return judged(
            fold, artifact, self.spec, self.consent, self.tick, self.request.seed, self.request.samples
        )

    def _finish(self, outcome: Outcome, stage: Staged, choice: Choice) -> Outcome:
        if outcome.exit_code is not ExitCode.OK:
            return replace(outcome, output=None)  # what was proven wrong is gone
        if choice.fell_short:
            outcome = replace(outcome, status="partly fused", exit_code=ExitCode.DIFFERENT)
        if self.request.dry_run:
            return replace(
                outcome, status="planned", next_step=f"without --dry-run this writes {self.target}"
            )
        stage.commit()
        return replace(outcome, next_step=verify_command(self.request, self.target, self.consent.words))

    def _refused(self, outcome: Outcome, choice: Choice, refused: Sequence[Refusal]) -> Outcome:
        if self.source.build is None:
            refused = [_with_remedy(refusal) for refusal in refused]
        return replace(
            outcome,
            refused=tuple(refused),
            unfused=choice.unfused((), refused) + self._beyond(choice),
            ledger=(*self.assumed, *facts.statistics_ledger(self.source.checkpoint, choice.names)),
        )

    def _beyond(self, choice: Choice) -> tuple[Unfused, ...]:
        return facts.norms_beyond(self.source.checkpoint, choice.modules)

    def _nothing(self, outcome: Outcome, choice: Choice, done: bool) -> Outcome:
        unfused = choice.unfused() + self._beyond(choice)
        if choice.dropped:
            why, step = "no group is left that can be fused", "see the reasons of the norms that are left"
        elif done:
            why, step = "every group of the spec is fused already", ""
        elif self.spec.discover:
            why, step = "the dataflow offers nothing to fold", "'fusecli explain CODE' says more"
        else:
            why = "the spec lists no groups"
            step = "add groups to the spec; 'fusecli plan' writes them where the model's code is at hand"
        problems = [why, *self._missed(choice, unfused)]
        failed = choice.fell_short
        code = ExitCode.REFUSED if problems[1:] else ExitCode.DIFFERENT if failed else ExitCode.NOTHING
        return replace(
            outcome,
            status="refused" if problems[1:] else "different" if failed else "nothing to fuse",
            exit_code=code,
            refused=tuple(choice.dropped.values()),
            ledger=(*outcome.ledger, *facts.bare_ledger(choice.bare)),
            unfused=unfused,
            problems=tuple(problems),
            next_step=step,
        )

    def _missed(
        self, choice: Choice, unfused: Sequence[Unfused], decisions: Sequence[Decision] = ()
    ) -> list[str]:
        counted, request = choice.counted(unfused, decisions), self.request
        return shortfall(counted, require_all=request.require_all, min_folded=request.min_folded)


def verify_command(request: FuseRequest, target: Path, allowed: Iterable[str]) -> str:
    """The command line that proves the written artifact again; `allowed`: whose code it may run."""
    words = ["fusecli", "verify", str(request.checkpoint), str(target), *request.typed]
    words += ["--spec", str(request.spec.source)] if request.spec.source else []
    # What --model names is allowed by being typed.
    needed = [name for name in dict.fromkeys(allowed) if name not in request.trusted]
    words += [word for name in needed for word in ("--allow-code", name)]
    return shlex.join(words + (["--allow-pickle"] if request.allow_pickle else []))


def _with_remedy(refusal: Refusal) -> Refusal:
    """Without model code, a shape that does not fit is most often a transposed convolution's."""
    if refusal.code != "shape" or refusal.remedy:
        return refusal
    fix = "a state dict does not tell a transposed convolution, nor its groups"
    return replace(refusal, remedy=f"{fix}: say {{modules: [...], kind: conv_transpose2d, groups: 1}}")
