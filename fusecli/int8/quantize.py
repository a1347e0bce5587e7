"""A float model to a graph of quantize, dequantize and ops between them: planned, calibrated, converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from fusecli.errors import Problem, UsageError
from fusecli.int8.annotate import Annotation
from fusecli.int8.calibrate import Learned, calibrate, teach, value_names
from fusecli.int8.export import Exported, exported
from fusecli.int8.flow import convert, prepare
from fusecli.int8.units import LeftFloat, Options, QuantUnit
from fusecli.sample import Sample


@dataclass(frozen=True)
class Plan:
    """What would be quantized, and what would stay float."""

    exported: Exported
    units: tuple[QuantUnit, ...]
    left: tuple[LeftFloat, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        return self.exported.notes


@dataclass(frozen=True)
class Quantized:
    """A converted graph, and how it came to be.

    plan   the float graph it was made of, its units, and what was left float
    model  the converted graph: integers for weights, a quantize and a dequantize at each quantized value
    names  what the observed values are called, by their node
    """

    plan: Plan
    model: GraphModule
    options: Options
    names: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def reference(self) -> GraphModule:
        """The exported float graph; it shares its parameters with the caller's model."""
        return self.plan.exported.module

    @property
    def units(self) -> tuple[QuantUnit, ...]:
        return self.plan.units

    @property
    def left(self) -> tuple[LeftFloat, ...]:
        return self.plan.left


def plan(model: nn.Module, sample: Sample) -> Plan:
    """What `quantize` would do to the model; torchao is not needed to know it."""
    graph = exported(model, sample)
    found = Annotation(graph.module)
    return Plan(graph, tuple(found.units), tuple(found.left))


def quantize(
    model: nn.Module,
    calibration: Sequence[Sample],
    options: Options | None = None,
    *,
    known: Learned | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Quantized:
    """The model with int8 weights and uint8 activations, whose ranges are those of the calibration batches.

    The model and the batches are not changed. Arguments and errors are those of `calibrated`; UsageError also
    where the model cannot be exported.
    """
    progress("exporting")
    return calibrated(plan(model, first(calibration)), calibration, options, known=known, progress=progress)


def calibrated(
    planned: Plan,
    calibration: Sequence[Sample],
    options: Options | None = None,
    *,
    known: Learned | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Quantized:
    """The plan, carried out.

    known: scale and zero point that training has learned, by the name of a weight or '<module path>.output';
    they replace what calibration says. progress is told what is done at the moment. Raises UsageError where
    there is nothing to quantize, or where calibration meets values that are not finite.
    """
    options = options or Options()
    first(calibration)
    require_units(planned)
    prepared = prepare(planned.exported.module, planned.units, options)
    names = value_names(prepared, planned.units)
    calibrate(prepared, names, calibration, progress)
    notes = (*planned.notes, *teach(prepared, names, planned.units, known or {}))
    progress("converting")
    return Quantized(planned, convert(prepared), options, names, notes)


def require_units(planned: Plan) -> None:
    """Raises UsageError where there is nothing to quantize."""
    if not planned.units:
        reasons = "; ".join(f"{left.node}: {left.reason}" for left in planned.left[:3])
        raise UsageError(Problem("nothing in the model can be quantized", fix=reasons))


def first(calibration: Sequence[Sample]) -> Sample:
    if not calibration:
        fix = "give inputs as the model sees them in use"
        raise UsageError(Problem("there is no calibration batch", fix=fix))
    return calibration[0]
