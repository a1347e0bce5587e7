"""`quantize` on files: fuse, export, calibrate, convert into a staged file, compare that file with the float
model, then put it in its place."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fusecli.checkpoint import check_target, open_checkpoint, staged, write_safetensors
from fusecli.commands import batches, int8, int8_facts
from fusecli.commands.floats import Floats, Stopped, floats_of, opened_floats
from fusecli.commands.fuse import protected
from fusecli.consent import Consent
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.int8.bias import correct_biases
from fusecli.int8.equalize import Equalized, equalized, unequal
from fusecli.int8.packed import packed, record_of, unpacked
from fusecli.int8.quantize import Plan, Quantized, calibrated, plan, require_units
from fusecli.int8.saved import archive, load
from fusecli.int8.torchao import flow
from fusecli.int8.units import Options
from fusecli.outcome import EqualizedReport, LedgerEntry, Outcome, Quantization
from fusecli.pipeline import facts
from fusecli.pipeline.fold import Progress
from fusecli.pipeline.weight_ranges import channel_range
from fusecli.proof.compare import TOLERANCE
from fusecli.rewrite import MANIFEST_KEY
from fusecli.sample import Sample
from fusecli.source.samples import as_computed
from fusecli.spec import Spec


@dataclass(frozen=True)
class QuantizeRequest:
    """One call of `fusecli quantize`. None: the name of the output, or the default."""

    checkpoint: Path
    spec: Spec
    output: Path | None = None
    format: str | None = None
    force: bool = False
    dry_run: bool = False
    allow_pickle: bool = False
    seed: int | None = None
    typed: tuple[str, ...] = ()
    trusted: tuple[str, ...] = ()

    @property
    def seeded(self) -> int:
        return self.seed if self.seed is not None else self.spec.verify.seed

    @property
    def target(self) -> tuple[str, Path]:
        """The format and the path that is written."""
        named = (
            {".safetensors": "safetensors", ".pt2": "pt2"}.get(self.output.suffix) if self.output else None
        )
        fmt = self.format or named or "pt2"
        beside = self.checkpoint.parent / f"{self.checkpoint.stem}.int8.{fmt}"
        return fmt, self.output or beside


def quantize_file(request: QuantizeRequest, consent: Consent, progress: Progress = lambda _: None) -> Outcome:
    """Does the whole job; nothing is at the target unless the thresholds of the spec are met.

    Raises UsageError, UnsafeError and RefusedError for what stops the work before there is a plan.
    """
    _, target = request.target
    check_target(target, request.checkpoint, request.force or request.dry_run, protected(request.spec))
    if not request.dry_run:
        flow()  # without torchao, all that comes before it would be for nothing
    with opened_floats(request.checkpoint, request.spec, request.allow_pickle, consent) as checkpoint:
        spec, _ = as_computed(request.spec, checkpoint)
        samples = batches.calibration(spec, request.seeded)
        given = batches.evaluation(spec, request.seeded)
        try:
            floats = floats_of(
                checkpoint, request.spec, consent, progress, request.allow_pickle, request.seeded
            )
        except Stopped as stopped:
            return stopped.outcome
    progress("exporting the model")
    work = Quantizing(spec, floats, samples, given)
    return _Quantize(replace(request, spec=spec), work, consent, progress).outcome()


@dataclass(frozen=True)
class Quantizing:
    """A float model on its way to int8: what it is calibrated on, and what it is judged on."""

    spec: Spec
    floats: Floats
    samples: batches.Batches
    given: batches.Batches

    def prepared(self) -> tuple[Plan, Quantization]:
        """The plan, and what is known of it before anything is calibrated; raises UsageError where the model
        or its graph does not take the samples."""
        floats, spec, samples, given = self.floats, self.spec, self.samples, self.given
        for some in (samples, given):
            batches.require_running(floats.original, some)
        batches.require_scores(floats.original, given)
        batches.require_measure(floats.original, given, spec)
        planned, moved, error = prepared(floats, spec, samples.samples[0])
        for some in (samples, given):
            batches.require_running(planned.exported.module, some)
        known = replace(
            described(planned, floats),
            options=shown_options(spec),
            calibration=samples.said,
            equalized=moved,
            exact=error,
            bytes=floats.bytes,
            notes=planned.notes,
        )
        return planned, known

    @property
    def remarks(self) -> tuple[LedgerEntry, ...]:
        """What the report says of the samples."""
        return (*batches.random_ledger(self.samples), *batches.judged_ledger(self.samples, self.given))

    @property
    def undecided(self) -> str:
        return batches.undecided(self.samples, self.given)


@dataclass(frozen=True)
class _Quantize:
    """Calibrates, converts, writes and compares."""

    request: QuantizeRequest
    work: Quantizing
    consent: Consent
    progress: Progress

    def outcome(self) -> Outcome:
        request, work = self.request, self.work
        floats, samples, spec = work.floats, work.samples, work.spec
        planned, known = work.prepared()
        outcome = replace(floats.outcome, ledger=(*floats.outcome.ledger, *work.remarks))
        if request.dry_run:
            return replace(outcome, status="planned", quantization=known, next_step=self._without_dry_run())
        options = choices_of(spec)
        quantized = calibrated(
            planned, samples.samples, options, known=floats.learned, progress=self.progress
        )
        if spec.quantize.correct_bias:
            corrected = quantized.reference, quantized.model, quantized.units
            correct_biases(*corrected, samples.samples, self.progress)
        return self._written(outcome, quantized, replace(known, notes=quantized.notes))

    def _without_dry_run(self) -> str:
        work, (_, target) = self.work, self.request.target
        if work.undecided:
            return f"without --dry-run this writes nothing: {work.undecided}; {int8.GIVE_DATA}"
        if not work.spec.quantize.threshold.asks:
            return f"without --dry-run this writes nothing: {int8.UNDECIDED}; {int8.ADD_THRESHOLD}"
        return f"without --dry-run this calibrates on {work.samples.said} and writes {target}"

    def _written(self, outcome: Outcome, quantized: Quantized, known: Quantization) -> Outcome:
        request, work, (fmt, target) = self.request, self.work, self.request.target
        floats, samples = work.floats, work.samples
        with staged(target, request.force, request.checkpoint, protected(work.spec)) as stage:
            self.progress("writing")
            _write(stage.path, fmt, quantized, _facts(request, quantized, floats, samples))
            known = replace(known, bytes={**known.bytes, "int8": stage.path.stat().st_size})
            self.progress("comparing with the float model")
            written = read_back(stage.path, fmt, quantized, floats, samples.samples[0])
            models = int8.Models(floats.original, floats.fused, quantized.reference, written)
            found, missed = int8.measured(models, quantized.units, work.spec, work.given, known)
            outcome = int8.judged(replace(outcome, status="quantized"), found, missed, work.undecided)
            if outcome.exit_code is not ExitCode.OK:
                return outcome
            outcome = replace(outcome, output=_output(stage.path, target, fmt))
            stage.commit()
        step = _verify_command(request, target, fmt, self.consent.words)
        return replace(outcome, next_step=step)


def prepared(
    floats: Floats, spec: Spec, sample: Sample
) -> tuple[Plan, tuple[EqualizedReport, ...], float | None]:
    """The plan, on a graph whose ranges were moved where the spec wants that, and how exact that was."""
    planned = plan(floats.fused, sample)
    require_units(planned)
    if not spec.quantize.equalize:
        return planned, (), None
    if floats.learned:
        what = "equalize changes the weights that scales were learned for"
        raise UsageError(Problem(what, spec.where(("quantize", "equalize")), "leave it out after QAT"))
    graph, moved = equalized(planned.exported.module)
    error = unequal(planned.exported.module, graph, sample)
    if error > TOLERANCE:
        raise UsageError(
            Problem(f"equalisation is off by {error:.1e} in float64", "equalize", "leave it out")
        )
    planned = replace(planned, exported=replace(planned.exported, module=graph))
    return planned, tuple(map(_moved, moved)), error


def _moved(pair: Equalized) -> EqualizedReport:
    values = {name: value for name, value in asdict(pair).items() if name != "scaled"}
    return EqualizedReport(**values)


def described(planned: Plan, floats: Floats) -> Quantization:
    """The units with their forecast, and what stays float."""
    modules = dict(floats.fused.named_modules())
    ranges = {}
    for unit in planned.units:
        path = unit.weight.rpartition(".")[0] if unit.weight else ""
        if path in modules and (found := channel_range(modules[path])) is not None:
            ranges[str(unit.weight)] = found
    return Quantization(int8.unit_reports(planned.units, ranges), int8.float_reports(planned.left))


def choices_of(spec: Spec) -> Options:
    return Options(observer=spec.quantize.observer, weights=spec.quantize.weights)


def shown_options(spec: Spec) -> dict[str, str]:
    chosen = spec.quantize
    extras = {"equalized": chosen.equalize, "biases corrected": chosen.correct_bias}
    return {"observer": chosen.observer, "weights": chosen.weights} | {
        name: "yes" for name, done in extras.items() if done
    }


def _facts(
    request: QuantizeRequest, quantized: Quantized, floats: Floats, samples: batches.Batches
) -> dict[str, Any]:
    """What the file says of itself; no time, no path: the same work gives the same bytes."""
    source, spec = floats.outcome.input, request.spec
    return {
        "version": int8_facts.VERSION,
        "mode": "int8",
        "input_sha256": source.sha256 if source else "",
        "calibration_sha256": batches.fingerprint(samples.samples),
        "versions": facts.versions(),
        "equalize": spec.quantize.equalize,
        "correct_bias": spec.quantize.correct_bias,
        "ops": op_names(quantized),
        "int8": record_of(quantized),
    }


def op_names(quantized: Quantized) -> list[str]:
    """The names of the ops of the converted graph, in order: a .pt2 file does not keep them."""
    return [node.name for node in quantized.model.graph.nodes if node.op == "call_function"]


def _write(path: Path, fmt: str, quantized: Quantized, said: Mapping[str, Any]) -> None:
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    if fmt == "pt2":
        path.write_bytes(archive(quantized, {int8_facts.PT2_FACTS: text}))
        return
    tensors, _ = packed(quantized)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(path, layout, tensors.items(), {MANIFEST_KEY: text})


def read_back(path: Path, fmt: str, quantized: Quantized, floats: Floats, sample: Sample) -> GraphModule:
    """The staged file as a user would load it, which has to give what was converted, to the bit.

    Raises UsageError where it does not.
    """
    if fmt == "pt2":
        written = load(path, op_names(quantized))
    else:
        with open_checkpoint(path) as artifact:
            said = int8_facts.facts_in(artifact)
            assert said is not None
            tensors = {name: stored.load().clone() for name, stored in artifact.tensors.items()}
        written = unpacked(floats.fused, sample, tensors, said["int8"])
    with torch.no_grad():
        mine, theirs = (batches.outputs(model, sample) for model in (quantized.model, written))
    if not all(map(torch.equal, mine, theirs)):
        what = "the written file does not compute what was converted"
        raise UsageError(Problem(what, str(path), "this torch cannot save the graph; try the other --format"))
    return written


def _output(staged_path: Path, target: Path, fmt: str) -> Any:
    found = facts.file_facts(staged_path, fmt)
    return replace(found, path=str(target))


def _verify_command(request: QuantizeRequest, target: Path, fmt: str, allowed: Iterable[str]) -> str:
    words = ["fusecli", "verify", str(request.checkpoint), str(target), *request.typed]
    words += ["--spec", str(request.spec.source)] if request.spec.source else []
    needed = [name for name in dict.fromkeys(allowed) if name not in request.trusted]
    words += [word for name in needed for word in ("--allow-code", name)]
    return shlex.join(words + (["--allow-pickle"] if request.allow_pickle or fmt == "pt2" else []))
