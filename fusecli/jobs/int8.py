"""What `quantize` and `verify` share about int8: batches and labels, the numbers of float against int8, the
facts that an int8 file says of itself."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fusecli.artifact import artifact_at
from fusecli.errors import ExitCode, Problem, UnsafeError, UsageError
from fusecli.int8.comparison import compare
from fusecli.int8.latency import latency
from fusecli.int8.numbers import accuracy
from fusecli.int8.threshold import Threshold, shortfalls
from fusecli.int8.torchao import quiet
from fusecli.int8.units import LeftFloat, QuantUnit
from fusecli.jobs.fuse import protected as read_by_fuse
from fusecli.jobs.inputs import entries_of, read_tensor, samples_of
from fusecli.jobs.source import folder_of
from fusecli.outcome import FloatReport, LedgerEntry, Outcome, Quantization, UnitReport
from fusecli.rewrite import MANIFEST_KEY
from fusecli.sample import Sample, tensors_in
from fusecli.spec import Spec
from fusecli.spec.quantize import Observer, Weights

VERSION = 1
PT2_FACTS = "fusecli.json"  # the extra file of a .pt2 that holds the facts
UNDECIDED = "no threshold says how like the float model it has to be"
_ADD = "add quantize: {threshold: {cosine: 0.98}} to the spec"
ADD_THRESHOLD = f"{_ADD}, or --threshold cosine=0.98"
_MOST_FACTS = 1 << 26  # bytes: more than a name for each op of any graph, and no bomb
_CHOICES = {"observer": get_args(Observer), "weights": get_args(Weights)}


@dataclass(frozen=True)
class Batches:
    """Forward calls, the labels of their rows where a file holds them, and where it all comes from.

    where  the place in the spec that says so
    """

    samples: Sequence[Sample]
    labels: Tensor | None
    said: str
    random: bool
    where: str = ""


def protected(spec: Spec) -> list[Path]:
    """Files besides the checkpoint that the work reads: those of a fold, and those to calibrate on."""
    read = [entry.file for entry in entries_of(spec.quantize.calibrate) if entry.file]
    return [*read_by_fuse(spec), *(folder_of(spec) / file for file in read)]


def evaluation(spec: Spec, seed: int) -> Batches:
    """What float and int8 are compared on: the inputs of the spec.

    Raises UsageError where a threshold asks for labels, and there are none.
    """
    given = _batches(spec, seed)
    if given.labels is None and spec.quantize.threshold.accuracy_drop is not None:
        fix = "add labels to inputs: {file: heldout.safetensors, key: images, labels: labels}"
        where = spec.where(("quantize", "threshold", "accuracy_drop"))
        raise UsageError(Problem("accuracy_drop needs labels, and the inputs have none", where, fix))
    return given


def calibration(spec: Spec, seed: int) -> Batches:
    """What the ranges are taken from: the spec's calibrate, else its inputs."""
    chosen = spec.quantize.calibrate
    if not chosen:
        return _batches(spec, seed)
    given = spec.model_copy(update={"inputs": chosen})
    return _batches(given, seed, spec.where(("quantize", "calibrate")))


def _batches(spec: Spec, seed: int, where: str = "") -> Batches:
    where = where or spec.where(("inputs",))
    samples = samples_of(spec, seed, spec.verify.samples)
    entries = list(entries_of(spec.inputs))
    random = any(entry.file is None for entry in entries)
    named = next((entry for entry in entries if entry.labels), None)
    rows = _rows(samples[0])
    if rows == 0:
        raise UsageError(Problem("there are no samples in it", where, "give one at least"))
    if not all(bool(tensor.isfinite().all()) for sample in samples for tensor in _tensors(sample)):
        raise UsageError(Problem("it has values that are not finite", where, "look at what is in the file"))
    labels = None
    if named is not None:
        labels = read_tensor(named.file or "", named.labels or "", folder_of(spec), where)
        _require_classes(labels, rows, where)
        labels = labels.repeat(len(samples))  # of a file beside random inputs: each sample has its rows
    if not random:
        samples = [part for sample in samples for part in _split(sample, spec.quantize.batch)]
    files = ", ".join(dict.fromkeys(f"{entry.file}:{entry.key}" for entry in entries if entry.file))
    said = f"{len(samples)} random inputs" if random else f"{rows} samples of {files}"
    return Batches(samples, labels, said, random, where)


def _require_classes(labels: Tensor, rows: int, where: str) -> None:
    fix = "give one class for each sample, a whole number"
    if labels.shape != (rows,):
        raise UsageError(Problem(f"{list(labels.shape)} labels for {rows} samples", where, fix))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        dtype = str(labels.dtype).removeprefix("torch.")
        raise UsageError(Problem(f"the labels are {dtype}, and no classes", where, fix))


def _rows(sample: Sample) -> int:
    """The size at dim 0 of the first tensor that has one."""
    tensors = [tensor for tensor in _tensors(sample) if tensor.ndim]
    return len(tensors[0]) if tensors else 1


def _tensors(sample: Sample) -> list[Tensor]:
    return tensors_in((sample.args, dict(sample.kwargs)))


def _split(sample: Sample, batch: int) -> Iterator[Sample]:
    """The sample in batches of so many rows; a tensor of another size at dim 0 is the same for all."""
    rows = _rows(sample)
    for start in range(0, rows, batch):
        end = min(start + batch, rows)

        def part(tensor: Tensor, start: int = start, end: int = end) -> Tensor:
            return tensor[start:end] if tensor.ndim and len(tensor) == rows else tensor

        yield sample.mapped(part)


@dataclass(frozen=True)
class Models:
    """The float model, its fold, the graph of that, and the int8 graph."""

    original: nn.Module
    fused: nn.Module
    reference: GraphModule
    int8: GraphModule


def measured(
    models: Models, units: Sequence[QuantUnit], spec: Spec, given: Batches, known: Quantization
) -> tuple[Quantization, list[str]]:
    """`known` with the numbers of float against int8, the worst unit first; and the thresholds it misses."""
    found = compare(models.reference, models.int8, [unit.output for unit in units], given.samples)
    likeness = {like.output: like for like in found.units}
    reports = []
    for unit, report in zip(units, known.units, strict=True):
        like = likeness[unit.output]
        reports.append(replace(report, sqnr=like.sqnr, cosine=like.cosine))
    reports.sort(key=lambda report: report.sqnr if report.sqnr is not None else float("inf"))
    shares = _accuracies(models, given)
    pair = (shares["float"], shares["int8"]) if shares else None
    seconds = latency(
        {"float": models.original, "fused": models.fused, "int8": models.int8}, given.samples[0], seconds=0.5
    )
    threshold = Threshold(**spec.quantize.threshold.model_dump())
    asked = {name: value for name, value in spec.quantize.threshold.model_dump().items() if value is not None}
    filled = replace(
        known,
        units=tuple(reports),
        samples=found.samples,
        sqnr=found.sqnr,
        cosine=found.cosine,
        worst_cosine=found.worst_cosine,
        top1=found.top1,
        accuracy=shares,
        latency=seconds,
        asked=asked,
    )
    return filled, shortfalls(threshold, found, pair)


@torch.no_grad()
def outputs(model: Callable[..., Any], sample: Sample) -> list[Tensor]:
    inputs = sample.copy()
    return tensors_in(model(*inputs.args, **inputs.kwargs))


def require_running(model: Callable[..., Any], given: Batches) -> None:
    """Raises UsageError where the model, or a graph of it, does not take a batch of these sizes."""
    shapes = set()
    for sample in given.samples:
        shape = tuple(tensor.shape for tensor in _tensors(sample))
        if shape in shapes:
            continue
        shapes.add(shape)
        try:
            with quiet():
                outputs(model, sample)
        except Exception as error:  # whatever somebody's forward may raise
            said = next(iter(str(error).splitlines()), "")
            what = f"the model does not run on these inputs: {type(error).__name__}: {said}"
            fix = "give sizes and dtypes that it takes, in calibrate and inputs alike, batch by batch"
            raise UsageError(Problem(what, given.where, fix)) from None


def require_scores(model: Callable[..., Any], given: Batches) -> None:
    """Raises UsageError where there are labels, and they are no classes of what the model gives."""
    if given.labels is None:
        return
    sample, labels = given.samples[0], given.labels.long()
    scores = _scores(model, sample)
    if scores is None or scores.ndim != 2 or len(scores) != _rows(sample):
        shape = "none" if scores is None else str(list(scores.shape))
        what = f"there are labels, but the model gives no scores [n, classes] (its first tensor: {shape})"
        raise UsageError(Problem(what, given.where, "take labels out of the inputs"))
    low, high, classes = int(labels.min()), int(labels.max()), scores.shape[1]
    if low < 0 or high >= classes:
        what = f"the labels go from {low} to {high}, and the model has {classes} classes"
        raise UsageError(Problem(what, given.where, f"give labels from 0 to {classes - 1}"))


def _accuracies(models: Models, given: Batches) -> dict[str, float]:
    if given.labels is None:
        return {}
    return {
        name: accuracy(torch.cat([_scores(model, sample) for sample in given.samples]), given.labels.long())
        for name, model in (("float", models.original), ("fused", models.fused), ("int8", models.int8))
    }


def _scores(model: Callable[..., Any], sample: Sample) -> Any:
    return next((leaf for leaf in outputs(model, sample) if leaf.is_floating_point()), None)


def judged(outcome: Outcome, found: Quantization, missed: Sequence[str]) -> Outcome:
    """The outcome with the numbers; a threshold decides, and without one nothing is decided."""
    if not found.asked:
        return replace(
            outcome,
            quantization=found,
            status="inconclusive",
            exit_code=ExitCode.INCONCLUSIVE,
            problems=(*outcome.problems, UNDECIDED),
            next_step=_ADD if outcome.command == "verify" else ADD_THRESHOLD,
        )
    if missed:
        return replace(
            outcome,
            quantization=found,
            status="different",
            exit_code=ExitCode.DIFFERENT,
            problems=(*outcome.problems, *missed),
            next_step="try quantize: {observer: histogram}, {equalize: true} or more calibration samples",
        )
    return replace(outcome, quantization=found)


def unit_reports(units: Sequence[QuantUnit], ranges: Mapping[str, float]) -> tuple[UnitReport, ...]:
    return tuple(
        UnitReport(unit.name, unit.kind, unit.modules, weight_range=ranges.get(unit.weight or ""))
        for unit in units
    )


def float_reports(left: Sequence[LeftFloat]) -> tuple[FloatReport, ...]:
    return tuple(FloatReport(one.module or one.node, one.op.rpartition(".")[2], one.reason) for one in left)


def random_ledger(given: Batches) -> list[LedgerEntry]:
    """Random inputs calibrate nothing, and compare little."""
    if not given.random:
        return []
    what = "random numbers calibrate nothing: the ranges are those of noise; give a file of real inputs"
    return [LedgerEntry("calibration", "quantize.calibrate", what)]


def facts_of(path: Path) -> dict[str, Any] | None:
    """What an int8 file says of itself; None for any other file. Nothing in it is run.

    Raises UnsafeError where what it says is damaged, or of another version.
    """
    if (artifact := artifact_at(path)) is not None:
        with artifact:
            return _read(artifact.metadata.get(MANIFEST_KEY), path)
    return _read(_text_inside(path), path)


def is_archive(path: Path) -> bool:
    """Whether the int8 file at `path` is a .pt2, by what is in it: its name may say anything."""
    return zipfile.is_zipfile(path)


def _text_inside(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = (e for e in archive.infolist() if e.filename.endswith(f"/extra/{PT2_FACTS}"))
            entry = next(entries, None)
            if entry is None or entry.file_size > _MOST_FACTS:
                return None
            return archive.read(entry).decode()
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None


def _read(text: str | None, path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("mode") != "int8":
        return None
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        what = f"its facts about int8 have version {version!r}, this fusecli reads {VERSION}"
        fix = "use the fusecli that wrote it, or quantize again"
        raise UnsafeError(Problem(what, str(path), fix))
    damaged = next((name for name, sound in _soundness(document) if not sound), None)
    if damaged is not None:
        what = f"what it says of itself is damaged: {damaged}"
        raise UnsafeError(Problem(what, str(path), "quantize the checkpoint again"))
    return document


def _soundness(said: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Each fact that is used, and whether it is of the type that was written."""
    for name in ("equalize", "correct_bias"):
        yield name, isinstance(said.get(name), bool)
    yield "input_sha256", isinstance(said.get("input_sha256"), str)
    yield "ops", _texts(said.get("ops"))
    inner = said.get("int8")
    yield "int8", isinstance(inner, dict)
    if isinstance(inner, dict):
        yield "options", _chosen(inner.get("options"))
        yield "units", _units(inner.get("units"))


def _chosen(options: Any) -> bool:
    if not isinstance(options, dict) or options.keys() != _CHOICES.keys():
        return False
    return all(options[name] in choices for name, choices in _CHOICES.items())


def _units(units: Any) -> bool:
    if not isinstance(units, list):
        return False
    return all(isinstance(unit, dict) and _texts(unit.get("nodes")) for unit in units)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
