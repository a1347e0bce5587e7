"""The numbers of float against int8, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import GraphModule

from fusecli.commands.batches import Batches, scores
from fusecli.errors import ExitCode
from fusecli.int8.comparison import Worst, compare
from fusecli.int8.latency import latency
from fusecli.int8.numbers import accuracy
from fusecli.int8.threshold import Threshold, shortfalls
from fusecli.int8.units import LeftFloat, QuantUnit
from fusecli.outcome import ChannelReport, FloatReport, Outcome, Quantization, UnitReport
from fusecli.spec import Spec

UNDECIDED = "no threshold says how like the float model it has to be"
_ADD = "add quantize: {threshold: {cosine: 0.98}} to the spec"
WHOLE = "the thresholds are asked of the output as a whole, and not of its channels"
ADD_THRESHOLD = f"{_ADD}, or --threshold cosine=0.98"
GIVE_DATA = (
    "give a file of real inputs: quantize: {calibrate: [{file: F, key: K}]}, and another one as inputs"
)


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
    lines = spec.quantize.threshold.model_dump(exclude={"whole"}, exclude_none=True)
    notes = (*known.notes, WHOLE) if threshold.whole and found.channel_sqnr is not None else known.notes
    filled = replace(
        known,
        units=tuple(reports),
        samples=found.samples,
        sqnr=found.sqnr,
        cosine=found.cosine,
        worst_cosine=found.worst_cosine,
        top1=found.top1,
        channel_sqnr=_channel(found.channel_sqnr),
        channel_cosine=_channel(found.channel_cosine),
        constant=found.constant,
        accuracy=shares,
        latency=seconds,
        asked=lines,
        notes=notes,
    )
    return filled, shortfalls(threshold, found, pair)


def _channel(worst: Worst | None) -> ChannelReport | None:
    return None if worst is None else ChannelReport(worst.value, worst.place)


def _accuracies(models: Models, given: Batches) -> dict[str, float]:
    if given.labels is None:
        return {}
    return {
        name: accuracy(torch.cat([scores(model, sample) for sample in given.samples]), given.labels.long())
        for name, model in (("float", models.original), ("fused", models.fused), ("int8", models.int8))
    }


def judged(outcome: Outcome, found: Quantization, missed: Sequence[str], undecided: str = "") -> Outcome:
    """The outcome with the numbers; a threshold decides, and without one nothing is decided.

    undecided: why no threshold can decide, '' where one can.
    """
    if undecided:
        return replace(
            outcome,
            quantization=found,
            status="inconclusive",
            exit_code=ExitCode.INCONCLUSIVE,
            problems=(*outcome.problems, undecided, *missed),
            next_step=GIVE_DATA,
        )
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
