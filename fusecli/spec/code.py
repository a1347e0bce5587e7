"""The parts of a spec that name Python code: nothing here imports or runs it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator
from typing_extensions import Self, TypeAliasType

from fusecli.spec.part import ClassName, Code, Listed, Maybe, Part, Section
from fusecli.spec.scalars import problem, read_free


def _form(value: object) -> str:
    return "<list>" if isinstance(value, list) else "<mapping>" if isinstance(value, dict) else "<value>"


# Nested values stay plain lists and dicts: they are handed to the factory as they are.
FreeValue = TypeAliasType(
    "FreeValue",
    "Annotated[Annotated[list[FreeValue], Tag('<list>')] | Annotated[dict[str, FreeValue], Tag('<mapping>')]"
    " | Annotated[Any, BeforeValidator(read_free), Tag('<value>')], Discriminator(_form)]",
)


class Model(Part):
    """The code that builds the model: `package.module:callable` or `path/to/file.py:callable`."""

    factory: Code
    kwargs: Section[dict[str, FreeValue]] = Field(default_factory=dict)


def _not_empty(sequence: tuple[str, ...]) -> tuple[str, ...]:
    if not sequence:
        raise problem("this sequence is empty", "for example [torch.nn.Conv2d, pkg.mod.Norm]")
    return sequence


class ExtraMapping(Part):
    """{sequence, fuser}: code that fuses these classes, or one that fuses itself; {treat, as}: a class that
    behaves like another."""

    sequence: Maybe[Annotated[Listed[ClassName], AfterValidator(_not_empty)]] = None
    fuser: Maybe[Code] = None
    treat: Maybe[ClassName] = None
    as_: Maybe[ClassName] = Field(default=None, alias="as")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = {key.rstrip("_") for key, value in self if value is not None}
        if given in ({"sequence", "fuser"}, {"treat", "as"}):
            return self
        fix = "write {sequence: [...], fuser: 'pkg.mod:function'} or {treat: class, as: class}"
        raise problem("an extra mapping is a sequence with its fuser, or a treat with its as", fix)
