"""How one scalar is read: as a name, a number, true or false, or whatever it looks like.

YAML 1.1 and 1.2 disagree about `012`, `yes` and `1_000`, so these are never guessed: where a name is
expected they are the text that stands there, anywhere else they are an error that says what to write.
Values from Python come through the same functions and are checked just as strictly.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable

from pydantic_core import PydanticCustomError

from fusecli.spec.nodes import Plain
from fusecli.spec.wording import closest, described, shown

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+|0o[0-7]+)")
_DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_OCTAL_OR_NOT = re.compile(r"([-+]?)0+([0-9]+)")
_UNDERSCORED = re.compile(r"[-+]?[0-9][0-9.]*(_[0-9.]+)+")
_LONGEST_NUMBER = 400  # no float needs more digits, and int() refuses beyond 4300 with its own words

_NOTHING = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_BOOLEANS_ONCE = {"yes": "true", "no": "false", "on": "true", "off": "false"}


def problem(what: str, fix: str = "") -> PydanticCustomError:
    """The error that a pydantic validator raises; `load` turns it into a located Problem."""
    return PydanticCustomError("spec", "{what}", {"what": what, "fix": fix})


def is_nothing(value: object) -> bool:
    """True of an absent value: None, an unquoted null or ~, a key with nothing after it."""
    return value is None or (isinstance(value, Plain) and value in _NOTHING)


def read_text(value: object) -> str:
    """The text as it stands in the file, whatever YAML would make of it: 1.10, 012, yes, null."""
    if not isinstance(value, str):
        raise problem(f"a name is expected, found {described(value)}", _quotes(value))
    if not value:
        raise problem("a name is expected, found nothing", "write the name, or remove the entry")
    return str(value)


def read_bool(value: object) -> bool:
    """True or False, for true and false only."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Plain) and value in _BOOLEANS:
        return _BOOLEANS[value]
    meant = _BOOLEANS_ONCE.get(value.lower()) if isinstance(value, Plain) else None
    fix = f"write {meant}" if meant else "write true or false, without quotes"
    raise problem(f"true or false is expected, found {described(value)}", fix)


def read_int(value: object) -> int:
    """A whole number: 12, 0x0c, 0o14."""
    number = _number(value, "a whole number")
    if not isinstance(number, int):
        raise problem(f"a whole number is expected, found {described(value)}")
    return number


def read_float(value: object) -> float | int:
    """A finite number; whole numbers stay whole, so that an integer range stays exact."""
    number = _number(value, "a number")
    if abs(number) <= sys.float_info.max:
        return number
    raise problem(f"a finite number is expected, found {described(value)}")


def read_free(value: object) -> object:
    """An unquoted scalar by the YAML 1.2 core schema; what YAML versions read differently is refused."""
    if not isinstance(value, Plain):
        return value
    if value in _NOTHING:
        return None
    if value in _BOOLEANS:
        return _BOOLEANS[value]
    if value.lower() in _BOOLEANS_ONCE:
        fix = f"write {_BOOLEANS_ONCE[value.lower()]}, or put the text in quotes"
        raise problem(f"{shown(value)} is true or false in some YAML readers and text in others", fix)
    _refuse_ambiguous(value, ", or put the text in quotes")
    number = _parsed(value)
    return str(value) if number is None else number


def one_of(what: str, options: Iterable[str]) -> Callable[[object], str]:
    """A reader for a word out of `options`."""
    words = tuple(options)

    def read(value: object) -> str:
        if isinstance(value, str) and value in words:
            return str(value)
        near = closest(value, words) if isinstance(value, str) else None
        fix = f"did you mean {shown(near)}?" if near else f"use one of: {', '.join(words)}"
        raise problem(f"{what} {described(value)} is unknown", fix)

    return read


def _number(value: object, expected: str) -> float | int:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, Plain):
        _refuse_ambiguous(value, "")
        number = _parsed(value)
        if number is not None:
            return number
    quoted = isinstance(value, str) and not isinstance(value, Plain) and _parsed(value) is not None
    raise problem(f"{expected} is expected, found {described(value)}", "remove the quotes" if quoted else "")


def _parsed(text: str) -> float | int | None:
    if len(text) > _LONGEST_NUMBER:
        return None
    if _INTEGER.fullmatch(text):
        return int(text, 0)
    if _DECIMAL.fullmatch(text):
        return float(text)
    return float(text.replace(".", "", 1)) if _NOT_FINITE.fullmatch(text) else None


def _refuse_ambiguous(text: str, otherwise: str) -> None:
    if match := _OCTAL_OR_NOT.fullmatch(text):
        sign, digits = match.groups()
        octal = f" or {sign}0o{digits}" if set(digits) <= set("01234567") else ""
        what = f"{shown(text)} is octal in some YAML readers and decimal in others"
        raise problem(what, f"write {sign}{digits}{octal}{otherwise}")
    if _UNDERSCORED.fullmatch(text):
        what = f"{shown(text)} is a number in some YAML readers and text in others"
        raise problem(what, f"write {text.replace('_', '')}{otherwise}")


def _quotes(value: object) -> str:
    return "" if isinstance(value, (dict, list)) else "put it in quotes"
