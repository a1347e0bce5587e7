"""What `quantize` and `verify` share about int8: batches and labels, the numbers of float against int8, the
facts that an int8 file says of itself."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fusecli.artifact import artifact_at
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.int8.comparison import compare
from fusecli.int8.latency import latency
from fusecli.int8.numbers import accuracy
from fusecli.int8.threshold import Threshold, shortfalls
from fusecli.int8.units import LeftFloat, QuantUnit
from fusecli.jobs.inputs import entries_of, read_tensor, samples_of
from fusecli.jobs.source import folder_of
from fusecli.outcome import FloatReport, LedgerEntry, Outcome, Quantization, UnitReport
from fusecli.rewrite import MANIFEST_KEY
from fusecli.sample import Sample, tensors_in
from fusecli.spec import Spec

VERSION = 1
PT2_FACTS = "fusecli.json"  # the extra file of a .pt2 that holds the facts


@dataclass(frozen=True)
class Batches:
    """Forward calls, the labels of their rows where a file holds them, and where it all comes from."""

    samples: Sequence[Sample]
    labels: Tensor | None
    said: str
    random: bool


def evaluation(spec: Spec, seed: int) -> Batches:
    """What float and int8 are compared on: the inputs of the spec."""
    return _batches(spec, seed)


def calibration(spec: Spec, seed: int) -> Batches:
    """What the ranges are taken from: the spec's calibrate, else its inputs."""
    chosen = spec.quantize.calibrate or spec.inputs
    return _batches(spec.model_copy(update={"inputs": chosen}), seed)


def _batches(spec: Spec, seed: int) -> Batches:
    samples = samples_of(spec, seed, spec.verify.samples)
    entries = list(entries_of(spec.inputs))
    random = any(entry.file is None for entry in entries)
    named = next((entry for entry in entries if entry.labels), None)
    labels = None
    if named is not None:
        labels = read_tensor(named.file or "", named.labels or "", folder_of(spec), spec.where(("inputs",)))
    if not random:
        samples = [part for sample in samples for part in _split(sample, spec.quantize.batch)]
    rows = sum(_rows(sample) for sample in samples)
    if labels is not None and labels.shape != (rows,):
        what = f"{list(labels.shape)} labels for {rows} samples"
        raise UsageError(Problem(what, spec.where(("inputs",)), "give one class for each sample"))
    files = ", ".join(dict.fromkeys(f"{entry.file}:{entry.key}" for entry in entries if entry.file))
    said = f"{len(samples)} random inputs" if random else f"{rows} samples of {files}"
    return Batches(samples, labels, said, random)


def _rows(sample: Sample) -> int:
    """The size at dim 0 of the first tensor that has one."""
    tensors = [tensor for tensor in tensors_in((sample.args, dict(sample.kwargs))) if tensor.ndim]
    return len(tensors[0]) if tensors else 1


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
    models: Models, units: Sequence[QuantUnit], spec: Spec, seed: int, known: Quantization
) -> tuple[Quantization, list[str]]:
    """`known` with the numbers of float against int8, the worst unit first; and the thresholds it misses."""
    given = evaluation(spec, seed)
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


@torch.no_grad()
def _accuracies(models: Models, given: Batches) -> dict[str, float]:
    if given.labels is None:
        return {}
    return {
        name: accuracy(torch.cat([_scores(model, sample) for sample in given.samples]), given.labels.long())
        for name, model in (("float", models.original), ("fused", models.fused), ("int8", models.int8))
    }


def _scores(model: Callable[..., Any], sample: Sample) -> Tensor:
    scores = next((leaf for leaf in outputs(model, sample) if leaf.is_floating_point()), None)
    if scores is None or scores.ndim != 2:
        shape = "none" if scores is None else str(list(scores.shape))
        what = f"there are labels, but the model gives no scores [n, classes] (its first tensor: {shape})"
        raise UsageError(Problem(what, "inputs", "take labels out of the inputs"))
    return scores


def judged(outcome: Outcome, found: Quantization, missed: Sequence[str]) -> Outcome:
    """The outcome with the numbers; a threshold decides, and without one nothing is decided."""
    if not found.asked:
        why = "no threshold says how like the float model it has to be"
        return replace(
            outcome,
            quantization=found,
            status="inconclusive",
            exit_code=ExitCode.INCONCLUSIVE,
            problems=(*outcome.problems, why),
            next_step="add quantize: {threshold: {cosine: 0.98}} to the spec, or --threshold cosine=0.98",
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
    """What an int8 file says of itself; None for any other file. Nothing in it is run."""
    if (artifact := artifact_at(path)) is not None:
        with artifact:
            return _read(artifact.metadata.get(MANIFEST_KEY))
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith(f"/extra/{PT2_FACTS}")), None)
            text = archive.read(name).decode() if name else None
    except (OSError, zipfile.BadZipFile):
        text = None
    return _read(text)


def _read(text: str | None) -> dict[str, Any] | None:
    try:
        document = json.loads(text) if text else None
    except ValueError:
        return None
    if not isinstance(document, dict) or document.get("mode") != "int8":
        return None
    return document if document.get("version") == VERSION else None
