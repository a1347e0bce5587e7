"""The parts of a spec that name Python code: nothing here imports or runs it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from typing_extensions import Self, TypeAliasType

from fusecli.spec.part import ClassName, Code, Listed, Part, as_mapping
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
    kwargs: Annotated[dict[str, FreeValue], BeforeValidator(as_mapping)] = Field(default_factory=dict)


class ExtraMapping(Part):
    """{sequence, fuser}: code that fuses these classes; {treat, as}: a class that behaves like another."""

    sequence: Listed[ClassName] | None = None
    fuser: Code | None = None
    treat: ClassName | None = None
    as_: ClassName | None = Field(default=None, alias="as")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = {key.rstrip("_") for key in self.model_fields_set}
        if given not in ({"sequence", "fuser"}, {"treat", "as"}):
            fix = "write {sequence: [...], fuser: 'pkg.mod:function'} or {treat: class, as: class}"
            raise problem("an extra mapping is a sequence with its fuser, or a treat with its as", fix)
        if self.sequence is not None and len(self.sequence) < 2:
            raise problem("a sequence needs at least two classes", "[torch.nn.Conv2d, pkg.mod.Norm]")
        return self
