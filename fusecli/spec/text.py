"""The bytes of a spec file and the text in them: what is refused before any YAML is parsed."""

from __future__ import annotations

import re
from pathlib import Path

from fusecli.errors import Problem, UsageError
from fusecli.spec.nodes import Finding, Place, in_order
from fusecli.spec.wording import closest, escaped, shown

LIMIT = 1 << 20

# YAML 1.1 counts U+0085, U+2028 and U+2029 as line ends; editors do not, so every line number would be off.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
_INDENTING_TAB = re.compile(r"^ *(\t)\s*[^\s#]", re.MULTILINE)
_MOST_SHOWN = 20


def read_bytes(path: Path) -> bytes:
    """The content of the file. Never reads more than the limit, whatever the path leads to."""
    where = escaped(str(path))
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except FileNotFoundError:
        raise UsageError(Problem("there is no such spec file", where, _neighbour(path))) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(Problem(f"the spec file cannot be read: {reason}", where)) from None
    if len(data) > LIMIT:
        fix = "a spec names layers and holds no data; wildcards such as 'layer*.*.conv1' shorten long lists"
        raise UsageError(Problem("the spec file is larger than 1 MiB", where, fix))
    return data


def decode(data: bytes, label: str) -> str:
    """The text of the file, or UsageError with every character that cannot stand in a spec."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        what = f"the byte 0x{data[error.start]:02x} is not UTF-8 text"
        found = Finding(_place(before, len(before), label), what, "save the file as UTF-8")
        raise UsageError(*in_order([found])) from None
    findings = _control_characters(text, label) + _tabs(text, label)
    if findings:
        raise UsageError(*in_order(findings))
    return text


def _control_characters(text: str, label: str) -> list[Finding]:
    fix = 'remove it; where a name really contains it, write the name in double quotes as "\\x1b"'
    return [
        Finding(
            _place(text, hit.start(), label), f"the character {shown(hit[0])} cannot stand in a spec", fix
        )
        for hit, _ in zip(_CONTROL.finditer(text), range(_MOST_SHOWN), strict=False)
    ]


def _tabs(text: str, label: str) -> list[Finding]:
    return [
        Finding(_place(text, hit.start(1), label), "a tab indents this line", "indent with spaces")
        for hit, _ in zip(_INDENTING_TAB.finditer(text), range(_MOST_SHOWN), strict=False)
    ]


def _place(text: str, offset: int, label: str) -> Place:
    lines = re.split("\r\n|\r|\n", text[:offset])
    return Place(len(lines), len(lines[-1]) + 1, label)


def _neighbour(path: Path) -> str:
    try:
        beside = [other.name for other in path.parent.iterdir() if other.suffix in {".yaml", ".yml"}]
    except (OSError, ValueError):
        return "check the path"
    near = closest(path.name, beside)
    return f"did you mean {shown(str(path.with_name(near)))}?" if near else "check the path"
