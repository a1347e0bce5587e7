"""What all parts of a spec share: frozen, no unknown keys, and the types their fields are made of."""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from fusecli.spec.scalars import is_nothing, problem, read_bool, read_float, read_int, read_text
from fusecli.spec.wording import described, shown

_IDENTIFIERS = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_MODULE_CODE = re.compile(rf"{_IDENTIFIERS}:{_IDENTIFIERS}")
_FILE_CODE = re.compile(rf".+\.py:{_IDENTIFIERS}", re.DOTALL)
_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")

T = TypeVar("T")


class Part(BaseModel):
    """A mapping of the spec: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def as_tuple(value: object) -> object:
    """A list as a tuple; nothing else is a list, and a set has no order to fuse in."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise problem(f"a list is expected, found {described(value)}", "write it in brackets: [...]")


def as_mapping(value: object) -> object:
    """A mapping, or a part that Python has built already."""
    if isinstance(value, (dict, BaseModel)):
        return value
    raise problem(f"a mapping is expected, found {described(value)}", "write it as key: value")


def _nothing_is_none(value: object) -> object:
    return None if is_nothing(value) else value


def _pattern(text: str) -> str:
    if "**" in text:
        raise problem(f"{shown(text)} has '**', which is no wildcard here", "write one * for each component")
    return text


def _code(text: str) -> str:
    if _MODULE_CODE.fullmatch(text) or _FILE_CODE.fullmatch(text):
        return text
    fix = "write 'package.module:callable' or 'path/to/file.py:callable'"
    raise problem(f"{shown(text)} does not name Python code", fix)


def _class_name(text: str) -> str:
    if _CLASS.fullmatch(text) or _FILE_CODE.fullmatch(text):
        return text
    fix = "write it with its module or file: 'torch.nn.Conv2d' or 'net.py:MyNorm'"
    raise problem(f"{shown(text)} does not name a class", fix)


def _countable(number: int) -> int:
    if not 1 <= number < 1 << 31:
        raise problem(f"this is at least 1 and below 2**31, found {number}")
    return number


def _read_eps(value: object) -> float:
    eps = read_float(value)
    if not eps > 0:
        raise problem(f"eps is above 0, found {eps}", "torch's own default is 1e-5")
    return float(eps)


Listed = Annotated[tuple[T, ...], BeforeValidator(as_tuple)]
Section = Annotated[T, BeforeValidator(as_mapping)]
Maybe = Annotated[T | None, BeforeValidator(_nothing_is_none)]

Text = Annotated[str, BeforeValidator(read_text)]
# An editor reads an unquoted 1.10 or null as YAML does; as a name it is good all the same.
Pattern = Annotated[
    Text, AfterValidator(_pattern), WithJsonSchema({"type": ["string", "number", "boolean", "null"]})
]
Flag = Annotated[bool, BeforeValidator(read_bool)]
Count = Annotated[
    int,
    BeforeValidator(read_int),
    AfterValidator(_countable),
    WithJsonSchema({"type": "integer", "minimum": 1}),
]
Eps = Annotated[float, BeforeValidator(_read_eps), WithJsonSchema({"type": "number", "exclusiveMinimum": 0})]
Code = Annotated[str, BeforeValidator(read_text), AfterValidator(_code)]
ClassName = Annotated[str, BeforeValidator(read_text), AfterValidator(_class_name)]
