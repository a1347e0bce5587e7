"""`quantize` on files: fuse, export, calibrate, convert into a staged file, compare that file with the float
model, then put it in its place."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fusecli.artifact import artifact_at, load_into, manifest_of
from fusecli.checkpoint import Checkpoint, check_target, open_checkpoint, staged, write_safetensors
from fusecli.consent import Consent
from fusecli.equivalence.compare import TOLERANCE
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.int8.bias import correct_biases
from fusecli.int8.equalize import Equalized, equalized, unequal
from fusecli.int8.packed import packed, unpacked
from fusecli.int8.quantize import Plan, Quantized, calibrated, plan, require_units
from fusecli.int8.saved import archive, load
from fusecli.int8.units import Options
from fusecli.jobs import facts, int8
from fusecli.jobs.fuse import FuseRequest, fuse_file
from fusecli.jobs.int8 import protected
from fusecli.jobs.proof import Tick
from fusecli.jobs.source import Source, source_of
from fusecli.jobs.trained import read_trained
from fusecli.jobs.weight_ranges import channel_range
from fusecli.outcome import EqualizedReport, Outcome, Quantization
from fusecli.rewrite import MANIFEST_KEY
from fusecli.sample import Sample
from fusecli.spec import Spec

Learned = Mapping[str, tuple[Tensor, Tensor]]
_CONTAINERS = ("conv_bn_relu", "linear_bn_relu")


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


@dataclass(frozen=True)
class Floats:
    """The float model and its fold, what was learned for it, and how the fold went (None: it was one)."""

    original: nn.Module
    fused: nn.Module
    learned: Learned
    outcome: Outcome
    bytes: Mapping[str, int]


class Stopped(Exception):
    """The fold did not succeed; carries its outcome."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.status)
        self.outcome = outcome


def quantize_file(request: QuantizeRequest, consent: Consent, tick: Tick = lambda _: None) -> Outcome:
    """Does the whole job; nothing is at the target unless the thresholds of the spec are met.

    Raises UsageError, UnsafeError and RefusedError for what stops the work before there is a plan.
    """
    fmt, target = request.target
    spec = request.spec
    check_target(target, request.checkpoint, request.force or request.dry_run, protected(spec))
    samples, given = int8.calibration(spec, request.seeded), int8.evaluation(spec, request.seeded)
    try:
        floats = floats_of(request.checkpoint, spec, consent, tick, request.allow_pickle, request.seeded)
    except Stopped as stopped:
        return stopped.outcome
    for batches in (samples, given):
        int8.require_running(floats.original, batches)
    int8.require_scores(floats.original, given)
    tick("exporting the model")
    planned, moved, error = prepared(floats, spec, samples.samples[0])
    for batches in (samples, given):
        int8.require_running(planned.exported.module, batches)
    known = replace(
        described(planned, floats),
        options=options_of(spec),
        calibration=samples.said,
        equalized=moved,
        exact=error,
        bytes=floats.bytes,
        notes=planned.notes,
    )
    outcome = replace(floats.outcome, ledger=(*floats.outcome.ledger, *int8.random_ledger(samples)))
    if request.dry_run:
        step = f"without --dry-run this calibrates on {samples.said} and writes {target}"
        if not spec.quantize.threshold.asks:
            step = f"without --dry-run this writes nothing: {int8.UNDECIDED}; {int8.ADD_THRESHOLD}"
        return replace(outcome, status="planned", quantization=known, next_step=step)
    quantized = calibrated(planned, samples.samples, choices_of(spec), known=floats.learned, tick=tick)
    if spec.quantize.correct_bias:
        correct_biases(quantized.reference, quantized.model, quantized.units, samples.samples, tick)
    known = replace(known, notes=quantized.notes)
    with staged(target, request.force, request.checkpoint, protected(spec)) as stage:
        tick("writing")
        _write(stage.path, fmt, quantized, _facts(request, quantized, floats, spec))
        known = replace(known, bytes={**known.bytes, "int8": stage.path.stat().st_size})
        tick("comparing with the float model")
        written = read_back(stage.path, fmt, quantized, floats, samples.samples[0])
        models = int8.Models(floats.original, floats.fused, quantized.reference, written)
        found, missed = int8.measured(models, quantized.units, spec, given, known)
        outcome = int8.judged(replace(outcome, status="quantized"), found, missed)
        if outcome.exit_code is not ExitCode.OK:
            return outcome
        outcome = replace(outcome, output=_output(stage.path, target, fmt))
        stage.commit()
    return replace(outcome, next_step=_verify_command(request, target, fmt, consent.words))


def floats_of(path: Path, spec: Spec, consent: Consent, tick: Tick, allow_pickle: bool, seed: int) -> Floats:
    """The float model and its fold, proven; raises Stopped where the fold does not succeed."""
    if not (spec.groups or spec.discover):
        spec = spec.model_copy(update={"discover": True})
    # A container would change the names of weights, and an exported graph has no use for it.
    spec = spec.model_copy(update={"qat": False, "no_rules": (*spec.no_rules, *_CONTAINERS)})
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle, **_nesting(path, spec))
    with checkpoint:
        manifest = manifest_of(checkpoint) if MANIFEST_KEY in checkpoint.metadata else None
        source = source_of(checkpoint, spec, consent)
        _require_code(source, spec)
        if manifest is not None and manifest.mode == "folded":
            return _folded(source, consent)
        with TemporaryDirectory(prefix="fusecli-") as folder:
            fused = Path(folder) / "fused.safetensors"
            fuse = FuseRequest(path, spec, fused, seed=seed, allow_pickle=allow_pickle)
            outcome = fuse_file(fuse, consent, tick)
            if outcome.exit_code not in (ExitCode.OK, ExitCode.NOTHING):
                raise Stopped(replace(outcome, command="quantize", output=None))
            read_trained(source, spec, manifest)
            original = source.original()
            size = facts.totals(facts.layout_of(source.checkpoint), None).bytes
            outcome = replace(outcome, command="quantize", output=None, problems=(), next_step="")
            if outcome.exit_code is ExitCode.NOTHING:
                outcome = replace(outcome, exit_code=ExitCode.OK)
                return Floats(original, original, {}, outcome, {"float": size, "fused": size})
            with open_checkpoint(fused) as artifact:
                assert source.build is not None
                model = load_into(source.build(), artifact, lambda: consent)
                learned = _learned(artifact)
                after = facts.totals(facts.layout_of(artifact), None).bytes
            return Floats(original, model.eval(), learned, outcome, {"float": size, "fused": after})


def _nesting(path: Path, spec: Spec) -> dict[str, Any]:
    """How the spec opens the checkpoint; an artifact has no nesting and no prefix."""
    if int8.facts_of(path) is not None:
        raise UsageError(Problem("is int8 already", str(path), "give the float checkpoint"))
    if artifact_at(path) is not None:
        return {}
    return {"key": spec.checkpoint.key, "strip_prefix": spec.checkpoint.strip_prefix}


def _require_code(source: Source, spec: Spec) -> None:
    if source.build is None:
        fix = "give --model and --input, or model and inputs in the spec"
        raise UsageError(Problem("int8 needs the model's code, which is exported", spec.where(()), fix))


def _folded(source: Source, consent: Consent) -> Floats:
    """An artifact that was folded before: its own float model is what int8 is held against."""
    assert source.build is not None
    checkpoint = source.checkpoint
    model = load_into(source.build(), checkpoint, lambda: consent).eval()
    size = facts.totals(facts.layout_of(checkpoint), None).bytes
    outcome = Outcome(
        "quantize",
        "nothing to fuse",
        ExitCode.OK,
        input=facts.input_facts(checkpoint),
        environment=facts.environment(),
    )
    return Floats(model, model, _learned(checkpoint), outcome, {"float": size, "fused": size})


def _learned(artifact: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """Scales and zero points that quantization-aware training has learned, by what they quantize."""
    trained = manifest_of(artifact).trained
    records = trained.quantizers if trained is not None else ()
    pairs = {record.of: record.tensors for record in records}
    stored = artifact.tensors
    return {what: (stored[a].load().clone(), stored[b].load().clone()) for what, (a, b) in pairs.items()}


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


def options_of(spec: Spec) -> dict[str, str]:
    chosen = spec.quantize
    extras = {"equalized": chosen.equalize, "biases corrected": chosen.correct_bias}
    return {"observer": chosen.observer, "weights": chosen.weights} | {
        name: "yes" for name, done in extras.items() if done
    }


def _facts(request: QuantizeRequest, quantized: Quantized, floats: Floats, spec: Spec) -> dict[str, Any]:
    """What the file says of itself; no time, no path: the same work gives the same bytes."""
    _, described_units = packed(quantized)
    source = floats.outcome.input
    return {
        "version": int8.VERSION,
        "mode": "int8",
        "input_sha256": source.sha256 if source else "",
        "versions": facts.versions(),
        "equalize": spec.quantize.equalize,
        "correct_bias": spec.quantize.correct_bias,
        "ops": [node.name for node in quantized.model.graph.nodes if node.op == "call_function"],
        "int8": described_units,
    }


def _write(path: Path, fmt: str, quantized: Quantized, said: Mapping[str, Any]) -> None:
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    if fmt == "pt2":
        path.write_bytes(archive(quantized, {int8.PT2_FACTS: text}))
        return
    tensors, _ = packed(quantized)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(path, layout, tensors.items(), {MANIFEST_KEY: text})


def read_back(path: Path, fmt: str, quantized: Quantized, floats: Floats, sample: Sample) -> GraphModule:
    """The staged file as a user would load it, which has to give what was converted, to the bit.

    Raises UsageError where it does not.
    """
    if fmt == "pt2":
        names = [node.name for node in quantized.model.graph.nodes if node.op == "call_function"]
        written = load(path, names)
    else:
        said = int8.facts_of(path)
        assert said is not None
        with open_checkpoint(path) as artifact:
            tensors = {name: stored.load().clone() for name, stored in artifact.tensors.items()}
        written = unpacked(floats.fused, sample, tensors, said["int8"])
    with torch.no_grad():
        mine, theirs = (int8.outputs(model, sample) for model in (quantized.model, written))
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
