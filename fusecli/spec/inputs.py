"""What the model is called with: one entry per argument of its forward, a tensor, a tuple or a dict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Discriminator, Tag, WithJsonSchema, model_validator
from typing_extensions import Self, TypeAliasType

from fusecli.spec.part import Count, Listed, Maybe, Part, Text
from fusecli.spec.scalars import one_of, problem, read_float, read_int
from fusecli.spec.wording import shown

DType = Literal[
    "float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"
]
_LIMITS = {"uint8": (0, 1 << 8)} | {
    f"int{bits}": (-(1 << bits - 1), 1 << bits - 1) for bits in (8, 16, 32, 64)
}
_MOST_ELEMENTS = 1 << 31


def _allocatable(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > _MOST_ELEMENTS:
        raise problem("this shape has more than 2**31 elements")
    return shape


def _low_before_high(ends: tuple[float, ...]) -> tuple[float, ...]:
    if len(ends) != 2 or not ends[0] < ends[1]:
        raise problem("a range is [low, high) with low < high", "for example range: [0, 1000]")
    return ends


def _keyword(name: str) -> str:
    if not name.isidentifier():
        raise problem(f"{shown(name)} cannot be the name of a forward argument")
    return name


def _axis(number: int) -> int:
    if number < 0:
        raise problem(f"an axis is counted from 0, found {number}")
    return number


def _distinct(axes: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(axes)) != len(axes):
        raise problem("an axis is named twice", "name each once, for example dynamic: [0, 2, 3]")
    return axes


Axis = Annotated[
    int,
    BeforeValidator(read_int),
    AfterValidator(_axis),
    WithJsonSchema({"type": "integer", "minimum": 0}),
]
Number = Annotated[int | float, BeforeValidator(read_float)]


class InputSpec(Part):
    """One tensor: drawn at random (shape, dtype, range) or read from a safetensors file (file, key).

    Without a dtype what is drawn has the dtype that the model computes in. range is half open: [low, high).
    A `name` passes the tensor by keyword. `labels` are the right answers for what a file holds, in the same
    file: a class for each. `dynamic` are the axes that may have other sizes: without it the proof tries them
    all, an empty list says that none has.
    """

    shape: Maybe[Annotated[Listed[Count], AfterValidator(_allocatable)]] = None
    dtype: Maybe[Annotated[DType, BeforeValidator(one_of("dtype", get_args(DType)))]] = None
    range: Maybe[Annotated[Listed[Number], AfterValidator(_low_before_high)]] = None
    file: Maybe[Text] = None
    key: Maybe[Text] = None
    labels: Maybe[Text] = None
    name: Maybe[Annotated[Text, AfterValidator(_keyword)]] = None
    dynamic: Maybe[Annotated[Listed[Axis], AfterValidator(_distinct)]] = None

    @model_validator(mode="after")
    def _drawn_or_read(self) -> Self:
        if (self.shape is None) == (self.file is None):
            what = "an input has a shape or a file" + (", not both" if self.file else "")
            raise problem(what, "write {shape: [2, 3, 224, 224]} or {file: samples.safetensors, key: images}")
        if self.file and self.key is None:
            raise problem("key is missing: which tensor of the file?", "for example key: images")
        if self.shape is not None and self.labels is not None:
            raise problem("labels belong to an input that is read from a file", "remove labels")
        if self.shape is not None and self.key is not None:
            raise problem(
                "key belongs to an input that is read from a file", "remove key, or give file for shape"
            )
        if self.file and (stray := sorted(self.model_fields_set & {"dtype", "range"})):
            raise problem(
                f"{' and '.join(stray)} cannot go with a file, which has its own values", "remove it"
            )
        if self.shape is not None and (beyond := [a for a in self.dynamic or () if a >= len(self.shape)]):
            last = f"the last is {len(self.shape) - 1}" if self.shape else "a number has none"
            raise problem(f"the shape has no axis {beyond[0]}", f"axes are counted from 0; {last}")
        return self._range_fits()

    def _range_fits(self) -> Self:
        if self.range is None or self.dtype is None or self.dtype.startswith(("float", "bfloat")):
            return self
        if self.dtype == "bool":
            raise problem("a bool input has no range", "remove range")
        low, high = _LIMITS[self.dtype]
        if not all(isinstance(end, int) for end in self.range):
            raise problem(f"the range of an {self.dtype} input is of whole numbers")
        if self.range[0] < low or self.range[1] > high:
            raise problem(f"the range does not fit {self.dtype}", f"{self.dtype} holds [{low}, {high})")
        return self


def is_mapping(value: object) -> bool:
    """Whether this is a dict of entries by name, and no entry itself: its values are entries, or lists or
    dicts of them.

    A name may be a key of an entry, too: {file: {shape: [1]}} is a dict that has a "file".
    """
    if not isinstance(value, dict):
        return False
    entries = {key for key, item in value.items() if _holds_entries(item)}
    return bool(entries) and not (value.keys() - entries) & InputSpec.model_fields.keys()


def _holds_entries(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_holds_entries, value))
    return isinstance(value, (dict, InputSpec))


def _form(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "<tuple>"
    return "<dict>" if is_mapping(value) else "<tensor>"


InputEntry = TypeAliasType(
    "InputEntry",
    "Annotated[Annotated[InputSpec, Tag('<tensor>')] | Annotated[Listed[InputEntry], Tag('<tuple>')]"
    " | Annotated[dict[Text, InputEntry], Tag('<dict>')], Discriminator(_form)]",
)


def refuse_misplaced_names(entries: tuple[InputEntry, ...]) -> tuple[InputEntry, ...]:
    """The entries, if keywords are at the top level, distinct, and after the positional ones."""
    names: list[str] = []
    for entry in entries:
        name = entry.name if isinstance(entry, InputSpec) else None
        if name is None and names:
            raise problem("a positional input stands after a named one", "positional inputs come first")
        if name in names:
            raise problem(f"two inputs are named {shown(str(name))}", "a keyword is given once")
        if name is not None:
            names.append(name)
        if not isinstance(entry, InputSpec) and any(part.name is not None for part in tensors_of([entry])):
            inside = "mapping" if isinstance(entry, dict) else "tuple"
            raise problem(
                f"a tensor inside a {inside} has a name", "only a whole argument can be passed by keyword"
            )
    return entries


def tensors_of(entries: Iterable[InputEntry]) -> Iterator[InputSpec]:
    """Every tensor that the entries describe, those within tuples and mappings too."""
    for entry in entries:
        if isinstance(entry, InputSpec):
            yield entry
        else:
            yield from tensors_of(entry.values() if isinstance(entry, dict) else entry)
