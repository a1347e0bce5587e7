"""The part of a spec that names a low-rank adapter, and how strongly it is added."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema, model_validator
from typing_extensions import Self

from fusecli.spec.part import Maybe, Part, Text
from fusecli.spec.scalars import problem, read_float

Real = Annotated[float, BeforeValidator(read_float), WithJsonSchema({"type": "number"})]


class Adapter(Part):
    """A LoRA adapter that is added to the checkpoint: W + scale B A.

    scale  the factor itself; `alpha` gives alpha / rank instead. With neither, adapter_config.json beside the
           file says it, as PEFT writes it.
    """

    file: Text
    scale: Maybe[Real] = None
    alpha: Maybe[Real] = None

    @model_validator(mode="after")
    def _one_factor(self) -> Self:
        if self.scale is not None and self.alpha is not None:
            raise problem("an adapter has a scale or an alpha, not both", "scale is alpha / rank")
        return self
