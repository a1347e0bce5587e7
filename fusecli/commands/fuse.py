"""`fuse` on files: resolve, record, select, fold into a staged file, prove that, then put it in its place."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fusecli.artifact import artifact_at, manifest_of, require_mode
from fusecli.checkpoint import (
    Checkpoint,
    check_target,
    fits_in_text,
    is_plain,
    open_checkpoint,
    staged,
)
from fusecli.consent import Consent
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.outcome import Judgement, Outcome, Refusal
from fusecli.pipeline import facts
from fusecli.pipeline.fold import Fold, Progress, edited_structure, manifest_for, write_fold
from fusecli.pipeline.outcome import Made, ledger_of, outcome_of, short, unlisted_norms, weighed
from fusecli.pipeline.prove import prove, trials_of
from fusecli.pipeline.select import Selection, record_and_select, select, shortfall
from fusecli.pipeline.settle import Settled, settle
from fusecli.plain import some
from fusecli.rewrite import MANIFEST_KEY, Manifest
from fusecli.sample import Sample
from fusecli.source.adapter import protected as adapter_files
from fusecli.source.groups import structure_and_groups
from fusecli.source.resolve import resolve
from fusecli.source.samples import samples_of
from fusecli.source.source import Source
from fusecli.source.trained import may_be_trained, require_folding
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

    @property
    def seeded(self) -> int:
        return self.seed if self.seed is not None else self.spec.verify.seed

    @property
    def target(self) -> tuple[str, Path]:
        """The format and the path that is written; a format follows --format, the output's name, the spec."""
        by_name = {".pt": "pt", ".pth": "pt", ".safetensors": "safetensors"}
        named = by_name.get(self.output.suffix) if self.output else None
        fmt = self.format or named or self.spec.output.format or "safetensors"
        if self.output is not None:
            return fmt, self.output
        return fmt, self.checkpoint.parent / f"{self.checkpoint.stem}.fused.{fmt}"


def fuse_file(request: FuseRequest, consent: Consent, progress: Progress = lambda _: None) -> Outcome:
    """Does the whole job; nothing is at the target unless the verdict is `equivalent`.

    Raises UsageError, UnsafeError and RefusedError for what stops the work before there is a plan.
    """
    fmt, target = request.target
    replaces = request.force or request.dry_run
    check_target(target, request.checkpoint, replaces, protected(request.spec))
    progress("opening the checkpoint")
    with opened(request.checkpoint, request.spec, request.allow_pickle, consent) as checkpoint:
        manifest = manifest_of(checkpoint) if MANIFEST_KEY in checkpoint.metadata else None
        if manifest is not None and manifest.mode == "folded":
            return _fused_already(checkpoint, manifest, request.spec)
        _require_storable(checkpoint, fmt)
        source, spec = resolve(checkpoint, request.spec, consent, manifest)
        return fuse_source(replace(request, spec=spec), source, consent, progress)


def fuse_source(request: FuseRequest, source: Source, consent: Consent, progress: Progress) -> Outcome:
    """Fuses what is resolved already, its checkpoint open; the same otherwise."""
    _require_work(request.spec, source)
    outcome = _Fuse(request, consent, progress).outcome(source)
    peak = facts.peak_memory()
    return replace(outcome, input=facts.input_facts(source.checkpoint), peak_memory=peak)


@dataclass(frozen=True)
class _Fuse:
    """One fuse of a source: the steps in a row."""

    request: FuseRequest
    consent: Consent
    progress: Progress

    def outcome(self, source: Source) -> Outcome:
        spec = self.request.spec
        self.progress("planning")
        selection = self._selected(source)
        settled = settle(selection, self._attempt)
        selection, fold = settled.selection, settled.fold
        missed = self._missed(selection, fold) if fold is not None and settled.made is None else []
        if fold is not None and fold.decisions and missed:
            return short(selection, fold, missed, spec)
        outcome = outcome_of(settled, spec)
        if missed:  # and there is nothing to fuse
            problems = (*outcome.problems, *missed)
            return replace(outcome, status="refused", exit_code=ExitCode.REFUSED, problems=problems)
        return self._with_next_step(outcome, settled)

    def _selected(self, source: Source) -> Selection:
        spec = self.request.spec
        source, structure, groups = structure_and_groups(source, spec)
        if source.build is None:
            selection = select(spec, source, structure, None, groups)
        else:
            sample = samples_of(spec, self.request.seeded, 1)[0]
            selection = record_and_select(spec, source, structure, sample, groups, self._other_samples)
        return replace(selection, keep_going=self.request.keep_going)

    def _other_samples(self) -> Sequence[Sample]:
        """The samples of the proof but for the first."""
        spec, count = self.request.spec, self.request.samples
        return samples_of(spec, self.request.seeded, count if count is not None else spec.verify.samples)[1:]

    def _missed(self, selection: Selection, fold: Fold) -> list[str]:
        """What --require-all and --min-folded have to say."""
        unfused = selection.unfused(fold.decisions) + unlisted_norms(selection)
        counted, request = selection.counted(unfused, fold.decisions), self.request
        return shortfall(counted, require_all=request.require_all, min_folded=request.min_folded)

    def _attempt(self, selection: Selection, fold: Fold) -> tuple[Made | None, Sequence[Refusal]]:
        """Writes the fold beside the target and proves it; it is put in its place where it is right. None:
        too little would be folded."""
        if self._missed(selection, fold):
            return None, ()
        request, (fmt, target) = self.request, self.request.target
        trials = trials_of(fold.source, request.spec, request.seed, request.samples)
        manifest = partial(manifest_for, fold, versions=facts.versions())
        replaces = request.force or request.dry_run
        with staged(target, replaces, request.checkpoint, protected(request.spec)) as stage:
            ranges = write_fold(fold, stage.path, fmt, manifest, self.progress)
            model, lost = edited_structure(fold)
            with open_checkpoint(stage.path) as artifact:
                proof = prove(fold, artifact, trials, self.consent, self.progress)
                written = facts.output_facts(target, artifact)
            ledger = (*ledger_of(selection, fold), *lost)
            made = weighed(proof, model, ledger=ledger, ranges=ranges, strict=request.strict)
            if made.verdict.judgement is Judgement.EQUIVALENT and not request.dry_run:
                stage.commit()
        return replace(made, output=written), proof.failures

    def _with_next_step(self, outcome: Outcome, settled: Settled[Made]) -> Outcome:
        made, (_, target) = settled.made, self.request.target
        if made is None or made.verdict.judgement is not Judgement.EQUIVALENT:
            return outcome
        if self.request.dry_run:
            step = f"without --dry-run this writes {target}"
            return replace(outcome, status="planned", next_step=step)
        return replace(outcome, next_step=verify_command(self.request, target, self.consent.words))


def _require_work(spec: Spec, source: Source) -> None:
    """Raises UsageError where neither the spec nor the checkpoint says what to fuse."""
    if source.trained is not None:
        require_folding(spec, source)
    elif spec.source is None and not (spec.discover or spec.groups):
        fix = "give --spec fuse.yaml, or --discover with --model and --input"
        if may_be_trained(source):
            fix += "; containers of quantization-aware training are known by the groups that name them"
        raise UsageError(Problem("nothing says what to fuse", str(source.checkpoint.path), fix))


def opened(path: Path, spec: Spec, allow_pickle: bool, consent: Consent) -> Checkpoint:
    """The checkpoint, as the spec says that it is nested."""
    consented = partial(open_checkpoint, path, allow_pickle=allow_pickle, consent=consent)
    try:
        return consented(key=spec.checkpoint.key, strip_prefix=spec.checkpoint.strip_prefix)
    except UsageError:
        # What the spec says of the original does not hold for the artifact made of it: no nesting, no prefix.
        if (plain := artifact_at(path)) is not None:
            return plain
        raise


def protected(spec: Spec) -> list[Path]:
    """Files besides the checkpoint that a command reads: the spec, its inputs, its code."""
    drawn = (*tensors_of(spec.inputs), *tensors_of(spec.quantize.calibrate))
    read = [entry.file for entry in drawn if entry.file]
    named = [spec.model.factory] if spec.model else []
    named += [extra.fuser for extra in spec.extra_mappings if extra.fuser]
    adapter = adapter_files(spec.adapter, spec.folder) if spec.adapter else []
    read += [source for source in (name.rpartition(":")[0] for name in named) if source.endswith(".py")]
    return [*filter(None, [spec.source]), *(spec.folder / file for file in read), *adapter]


def _fused_already(checkpoint: Checkpoint, manifest: Manifest, spec: Spec) -> Outcome:
    if spec.qat:
        require_mode(manifest, "qat", str(checkpoint.path))
    groups = len(manifest.groups)
    return Outcome(
        "fuse",
        "nothing to fuse",
        ExitCode.NOTHING,
        spec=facts.spec_facts(spec),
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


def verify_command(request: FuseRequest, target: Path, allowed: Iterable[str]) -> str:
    """The command line that proves the written artifact again; `allowed`: whose code it may run."""
    words = ["fusecli", "verify", str(request.checkpoint), str(target), *request.typed]
    words += ["--spec", str(request.spec.source)] if request.spec.source else []
    # What --model names is allowed by being typed.
    needed = [name for name in dict.fromkeys(allowed) if name not in request.trusted]
    words += [word for name in needed for word in ("--allow-code", name)]
    return shlex.join(words + (["--allow-pickle"] if request.allow_pickle else []))
