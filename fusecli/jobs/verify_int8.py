"""`verify` of an int8 file: how like the float model it is, measured again from the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from fusecli.checkpoint import open_checkpoint
from fusecli.consent import Consent
from fusecli.errors import ExitCode, Problem, UnsafeError, UsageError
from fusecli.int8.bias import miscorrected
from fusecli.int8.packed import unpacked
from fusecli.int8.quantize import Plan, calibrated
from fusecli.int8.rounded import misrounded, other_ops, otherwise_scaled
from fusecli.int8.saved import load
from fusecli.jobs import batches, facts, int8, int8_facts
from fusecli.jobs.floats import Floats, Stopped, floats_of
from fusecli.jobs.proof import Tick
from fusecli.jobs.quantize import choices_of, described, prepared, shown_options
from fusecli.outcome import LedgerEntry, Outcome
from fusecli.sample import Sample
from fusecli.spec import Spec

_SAME = "verify it with the spec that it was made with"


@dataclass(frozen=True)
class Int8Request:
    """One call of `fusecli verify` on an int8 file, whose facts are `said`."""

    checkpoint: Path
    int8: Path
    said: Mapping[str, Any]
    spec: Spec | None
    allow_pickle: bool
    seed: int | None


def verify_int8(request: Int8Request, consent: Consent, tick: Tick) -> Outcome:
    """The numbers of float against int8, and whether they meet the spec's thresholds.

    Raises UsageError and UnsafeError where the files cannot be judged.
    """
    spec = request.spec
    if spec is None:
        what = "an int8 file is judged by running it beside the float model"
        raise UsageError(Problem(what, str(request.int8), "give --spec, or --model and --input"))
    spec, told = batches.typed(request.checkpoint, _as_made(spec, request.said), request.allow_pickle)
    seed = request.seed if request.seed is not None else spec.verify.seed
    samples = batches.evaluation(spec, seed)
    archive = int8_facts.is_archive(request.int8)
    if archive and not request.allow_pickle:
        what = "torch.export.load runs code that a .pt2 file names"
        fix = "add --allow-pickle if you trust it, or quantize with --format safetensors"
        raise UnsafeError(Problem(what, str(request.int8), fix))
    try:
        floats = floats_of(request.checkpoint, spec, consent, tick, request.allow_pickle, seed)
    except Stopped as stopped:
        return replace(stopped.outcome, command="verify")
    batches.require_running(floats.original, samples)
    batches.require_scores(floats.original, samples)
    planned, moved, error = prepared(floats, spec, samples.samples[0])
    batches.require_running(planned.exported.module, samples)
    if [list(unit.nodes) for unit in planned.units] != [
        unit["nodes"] for unit in request.said["int8"]["units"]
    ]:
        what = "its units are not those of this model: it was made with another spec, model or torch"
        raise UsageError(Problem(what, str(request.int8), _SAME))
    tick("loading the int8 model")
    written = _loaded(request, archive, floats, samples.samples[0])
    if strange := other_ops(planned.exported.module, written):
        what = f"its ops are not those of this model: {', '.join(strange[:3])}"
        raise UsageError(Problem(what, str(request.int8), _SAME))
    known = replace(
        described(planned, floats),
        options=shown_options(spec),
        bytes={**floats.bytes, "int8": request.int8.stat().st_size},
        equalized=moved,
        exact=error,
        notes=planned.notes,
    )
    tick("comparing with the float model")
    models = int8.Models(floats.original, floats.fused, planned.exported.module, written)
    found, missed = int8.measured(models, planned.units, spec, samples, known)
    outcome = replace(
        floats.outcome,
        command="verify",
        status="verified",
        exit_code=ExitCode.OK,
        output=facts.file_facts(request.int8, "pt2" if archive else "safetensors"),
        ledger=(*told, *floats.outcome.ledger, *batches.random_ledger(samples), *_mismatch(request, floats)),
    )
    outcome = int8.judged(outcome, found, missed)
    wrong = list(_wrong(planned, written, floats, spec, seed, tick))
    if not wrong:
        return outcome
    return replace(
        outcome,
        status="different",
        exit_code=ExitCode.DIFFERENT,
        problems=(*wrong, *outcome.problems),
        next_step="do not release this file; quantize the checkpoint again",
    )


def _wrong(
    planned: Plan, written: GraphModule, floats: Floats, spec: Spec, seed: int, tick: Tick
) -> Iterator[str]:
    """What the file holds that is not made of the float model, in sentences: no threshold decides that.

    The model is calibrated once more, on what the spec says.
    """
    reference, units, corrected = planned.exported.module, planned.units, spec.quantize.correct_bias
    if wrong := misrounded(reference, written, units, corrected=corrected):
        yield f"it does not hold the float model's numbers, rounded: {', '.join(wrong[:3])}"
    given = batches.calibration(spec, seed)
    again = calibrated(planned, given.samples, choices_of(spec), known=floats.learned, tick=tick)
    if wrong := otherwise_scaled(again, written):
        yield f"calibration on {given.said} does not give its scales: {', '.join(wrong[:3])}"
    if corrected and (wrong := miscorrected(reference, written, units, given.samples, tick)):
        yield f"correction on {given.said} does not give its biases: {', '.join(wrong[:3])}"


def _as_made(spec: Spec, said: Mapping[str, Any]) -> Spec:
    """The spec, with what the file says of how it was made."""
    done = {name: bool(said[name]) for name in ("equalize", "correct_bias")}
    chosen = spec.quantize.model_copy(update={**said["int8"]["options"], **done})
    return spec.model_copy(update={"quantize": chosen})


def _loaded(request: Int8Request, archive: bool, floats: Floats, sample: Sample) -> GraphModule:
    if archive:
        return load(request.int8, request.said["ops"])
    with open_checkpoint(request.int8) as artifact:
        tensors = {name: stored.load().clone() for name, stored in artifact.tensors.items()}
    return unpacked(floats.fused, sample, tensors, request.said["int8"])


def _mismatch(request: Int8Request, floats: Floats) -> list[LedgerEntry]:
    source = floats.outcome.input
    own = source.sha256 if source is not None else None
    noted = request.said["input_sha256"]
    return facts.other_file_ledger(request.checkpoint, own, noted, "int8 model")
