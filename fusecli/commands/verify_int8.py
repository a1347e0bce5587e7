"""`verify` of an int8 file: how like the float model it is, measured again from the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from fusecli.checkpoint import open_checkpoint
from fusecli.commands import batches, int8, int8_facts
from fusecli.commands.batches import Batches
from fusecli.commands.floats import Floats, Stopped, floats_of, opened_floats
from fusecli.commands.quantize import Quantizing, choices_of, op_names
from fusecli.consent import Consent
from fusecli.errors import ExitCode, Problem, UnsafeError, UsageError
from fusecli.int8.bias import miscorrected
from fusecli.int8.packed import described as record
from fusecli.int8.packed import unpacked
from fusecli.int8.programs import unlike
from fusecli.int8.quantize import Plan, Quantized, calibrated
from fusecli.int8.rounded import misrounded, otherwise_scaled
from fusecli.int8.saved import archive, module_of, program_in, read
from fusecli.outcome import LedgerEntry, Outcome
from fusecli.pipeline import facts
from fusecli.pipeline.fold import Progress
from fusecli.sample import Sample
from fusecli.source.samples import as_computed
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


def verify_int8(request: Int8Request, consent: Consent, progress: Progress) -> Outcome:
    """The numbers of float against int8, and whether they meet the spec's thresholds.

    Raises UsageError and UnsafeError where the files cannot be judged.
    """
    spec = request.spec
    if spec is None:
        what = "an int8 file is judged by running it beside the float model"
        raise UsageError(Problem(what, str(request.int8), "give --spec, or --model and --input"))
    with opened_floats(request.checkpoint, spec, request.allow_pickle, consent) as checkpoint:
        made = _as_made(spec, request.said)
        spec, _ = as_computed(made, checkpoint)
        seed = request.seed if request.seed is not None else spec.verify.seed
        samples, given = batches.calibration(spec, seed), batches.evaluation(spec, seed)
        if int8_facts.is_archive(request.int8) and not request.allow_pickle:
            what = "torch.export.load runs code that a .pt2 file names"
            fix = "add --allow-pickle if you trust it, or quantize with --format safetensors"
            raise UnsafeError(Problem(what, str(request.int8), fix))
        try:
            floats = floats_of(checkpoint, made, consent, progress, request.allow_pickle, seed)
        except Stopped as stopped:
            return replace(stopped.outcome, command="verify")
    return _compared(request, Quantizing(spec, floats, samples, given), progress)


def _compared(request: Int8Request, work: Quantizing, progress: Progress) -> Outcome:
    """The int8 file beside the float model and what that is converted to, calibrated once more."""
    spec, floats, samples = work.spec, work.floats, work.samples
    is_archive = int8_facts.is_archive(request.int8)
    planned, known = work.prepared()
    _require_same_model(request, planned)
    again = calibrated(planned, samples.samples, choices_of(spec), known=floats.learned, progress=progress)
    known = replace(known, calibration="", bytes={**known.bytes, "int8": request.int8.stat().st_size})
    outcome = replace(
        floats.outcome,
        command="verify",
        status="verified",
        exit_code=ExitCode.OK,
        output=facts.file_facts(request.int8, "pt2" if is_archive else "safetensors"),
        ledger=(*floats.outcome.ledger, *work.remarks, *_mismatch(request, floats)),
    )
    progress("loading the int8 model")
    try:
        written = _opened(request, again) if is_archive else _unpacked(request, floats, samples.samples[0])
    except _Unlike as error:
        return _different(replace(outcome, quantization=known), [str(error)])
    progress("comparing with the float model")
    models = int8.Models(floats.original, floats.fused, planned.exported.module, written)
    found, missed = int8.measured(models, planned.units, spec, work.given, known)
    outcome = int8.judged(outcome, found, missed, work.undecided)
    wrong, claimed = _held_against(again, written, spec, samples, request.said, progress)
    if wrong:
        return _different(outcome, wrong)
    return _claimed(outcome, claimed) if claimed else outcome


def _different(outcome: Outcome, wrong: Sequence[str]) -> Outcome:
    return replace(
        outcome,
        status="different",
        exit_code=ExitCode.DIFFERENT,
        problems=(*wrong, *outcome.problems),
        next_step="do not release this file; quantize the checkpoint again",
    )


def _claimed(outcome: Outcome, claimed: Sequence[str]) -> Outcome:
    """What only its own calibration data could show is not shown, whatever the numbers are."""
    if outcome.exit_code is ExitCode.DIFFERENT:
        return replace(outcome, problems=(*outcome.problems, *claimed))
    return replace(
        outcome,
        status="inconclusive",
        exit_code=ExitCode.INCONCLUSIVE,
        problems=(*outcome.problems, *claimed),
        next_step="give calibrate the data that it was made with, and the same batch",
    )


def _held_against(
    again: Quantized,
    written: GraphModule,
    spec: Spec,
    given: Batches,
    said: Mapping[str, Any],
    progress: Progress,
) -> tuple[list[str], list[str]]:
    """What the file holds that is not made of the float model, in sentences, and what of it is only claimed:
    numbers that come from calibration, where the file says that it had other data. No threshold decides that.

    again: the float model, calibrated and converted once more
    """
    corrected = spec.quantize.correct_bias
    wrong, calibration = list[str](), list[str]()
    if names := misrounded(again.reference, written, again.units, corrected=corrected):
        wrong.append(f"it does not hold the float model's numbers, rounded: {', '.join(names[:3])}")
    names = otherwise_scaled(again, written)
    weights = [f"{unit.weight}.{part}" for unit in again.units for part in ("scale", "zero_point")]
    if names:
        what = f"calibration on {given.said} does not give its scales: {', '.join(names[:3])}"
        (wrong if set(names) & set(weights) else calibration).append(what)
    if corrected:
        names = miscorrected(again.reference, written, again.units, given.samples, progress)
        if names:
            what = f"correction on {given.said} does not give its biases: {', '.join(names[:3])}"
            calibration.append(what)
    if said.get("calibration_sha256", "") in ("", batches.fingerprint(given.samples)):
        return [*wrong, *calibration], []
    return wrong, [
        f"{what}; it says that it had other data, so they are claimed only" for what in calibration
    ]


def _require_same_model(request: Int8Request, planned: Plan) -> None:
    """Raises UsageError where the file speaks of other units and ops than this model has."""
    for key, value in record(planned).items():
        if request.said["int8"].get(key) != value:
            what = f"its {key} are not those of this model: it was made with another spec, model or torch"
            raise UsageError(Problem(what, str(request.int8), _SAME))


class _Unlike(Exception):
    """The program of the file is not the one that the float model is converted to; says where."""


def _opened(request: Int8Request, again: Quantized) -> GraphModule:
    """The graph of the .pt2 file, that of `again` but for numbers; raises _Unlike where it is another."""
    names = op_names(again)
    if request.said["ops"] != names:
        what = "the ops that it names are not those of this model"
        raise UsageError(Problem(what, str(request.int8), _SAME))
    written = read(request.int8)
    if found := unlike(program_in(archive(again)), written):
        what = f"it is not what the float model is converted to: {'; '.join(found[:3])}"
        raise _Unlike(what + _made_with(request.said))
    return module_of(written, names, str(request.int8))


def _made_with(said: Mapping[str, Any]) -> str:
    """Another torch may write another graph, which is no fault of the file."""
    versions = said.get("versions")
    mine, theirs = facts.versions()["torch"], versions.get("torch") if isinstance(versions, dict) else None
    return "" if theirs == mine else f" (it says that torch {theirs} made it, and this is torch {mine})"


def _as_made(spec: Spec, said: Mapping[str, Any]) -> Spec:
    """The spec, with what the file says of how it was made."""
    done = {name: bool(said[name]) for name in ("equalize", "correct_bias")}
    chosen = spec.quantize.model_copy(update={**said["int8"]["options"], **done})
    return spec.model_copy(update={"quantize": chosen})


def _unpacked(request: Int8Request, floats: Floats, sample: Sample) -> GraphModule:
    with open_checkpoint(request.int8) as artifact:
        tensors = {name: stored.load().clone() for name, stored in artifact.tensors.items()}
    return unpacked(floats.fused, sample, tensors, request.said["int8"])


def _mismatch(request: Int8Request, floats: Floats) -> list[LedgerEntry]:
    source = floats.outcome.input
    own = source.sha256 if source is not None else None
    noted = request.said["input_sha256"]
    return facts.other_file_ledger(request.checkpoint, own, noted, "int8 model")
