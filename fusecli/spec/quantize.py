"""The part of a spec that says how a fused model becomes int8, and what it has to be like then."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, WithJsonSchema, model_validator
from typing_extensions import Self

from fusecli.spec.inputs import InputEntry, refuse_misplaced_names
from fusecli.spec.part import Count, Flag, Listed, Maybe, Part, Section
from fusecli.spec.scalars import one_of, problem, read_float

Observer = Literal["minmax", "histogram"]
Weights = Literal["per-channel", "per-tensor"]
Real = Annotated[float, BeforeValidator(read_float), WithJsonSchema({"type": "number"})]


class Threshold(Part):
    """How like the float model the int8 one has to be; what is not given is not asked.

    sqnr           of the output, and of its worst channel, in dB, at least; an output of zeros has 0
    cosine         of the output, averaged over the samples, and of its worst channel, at least; not for an
                   output of one number for each sample
    top1           the share of samples with the same label, at least
    accuracy_drop  in points of 100, at most; needs labels
    whole          sqnr and cosine of the output as a whole, and not of its worst channel: for embeddings, of
                   which nobody looks at one number
    """

    sqnr: Maybe[Real] = None
    cosine: Maybe[Real] = None
    top1: Maybe[Real] = None
    accuracy_drop: Maybe[Real] = None
    whole: Flag = False

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if self.sqnr is not None and self.sqnr <= 0:
            raise problem(f"sqnr is above 0, found {self.sqnr:g}", "an output of zeros has 0 dB")
        for name, value, low, high in (
            ("cosine", self.cosine, -1, 1),
            ("top1", self.top1, 0, 1),
            ("accuracy_drop", self.accuracy_drop, 0, 100),
        ):
            if value is not None and not low <= value <= high:
                raise problem(f"{name} is between {low} and {high}, found {value:g}")
        if self.cosine == -1 or self.top1 == 0 or self.accuracy_drop == 100:
            raise problem("a threshold that everything passes proves nothing", "ask for something")
        return self

    @property
    def asks(self) -> bool:
        return any(line is not None for line in (self.sqnr, self.cosine, self.top1, self.accuracy_drop))


class Quantize(Part):
    """How the model is quantized, after it was fused.

    calibrate  what the ranges of activations are taken from; empty: the inputs of the spec
    batch      how many samples of a file are run at once
    observer   "minmax": the smallest and the largest value seen; "histogram": what loses least of most
               values, which depends on the batches that they come in
    weights    a scale for each output channel, or one for each weight
    equalize   move ranges between layers in a row first, which changes nothing that they compute
    correct_bias  put into each bias what rounding moves the mean of the layer's output by
    threshold  what decides the exit code
    """

    calibrate: Listed[InputEntry] = ()
    batch: Count = 32
    observer: Annotated[Observer, BeforeValidator(one_of("observer", get_args(Observer)))] = "minmax"
    weights: Annotated[Weights, BeforeValidator(one_of("weights", get_args(Weights)))] = "per-channel"
    equalize: Flag = False
    correct_bias: Flag = False
    threshold: Section[Threshold] = Threshold()

    @model_validator(mode="after")
    def _positional_first(self) -> Self:
        refuse_misplaced_names(self.calibrate)
        return self
