"""A spec that is typed: a model and its inputs as options of a command, beside a file or without one."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusecli.errors import Problem, UsageError
from fusecli.spec.load import read_spec, spec_from_mapping
from fusecli.spec.model import Spec

_CALL = re.compile(r"(?P<factory>[^()]+:[^()]+?)(?:\((?P<kwargs>.*)\))?", re.DOTALL)
_INPUT = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d{1,10}(?:x\d{1,10})*)(?::(?P<dtype>[a-z]+\d*))?"
    r"(?::(?P<low>[-+.\de]+?)\.\.(?P<high>[-+.\de]+))?"
)
_FILE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<file>.+\.safetensors):(?P<key>.+)")

_COMMA = re.compile(r",\s*(?=[A-Za-z_]\w*=|$)")
_NAMED = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Typed:
    """What can be typed of a spec; what is None, empty or False was not.

    model   "pkg.module:factory" or "net.py:Net(width=8)", relative to the working folder
    inputs  "2x3x224x224", "2x16:int64:0..1000", "mask=2x16:bool", "samples.safetensors:images"; a dict is
            "image=1x3x8x8,mask=1x8x8"
    """

    model: str | None = None
    inputs: Sequence[str] | None = None
    discover: bool = False
    target: str | None = None
    exclude: Sequence[str] | None = None
    shared: str | None = None
    bake: bool = False
    rules: str | None = None
    no_rules: str | None = None
    allow_restructure: bool = False
    remove_idle: bool = False
    assume_same_path: bool = False
    memory: str | None = None
    qat: bool | None = None
    eps: float | None = None
    quantize: Mapping[str, Any] | None = None

    def entries(self, *, absolute: bool) -> dict[str, Any]:
        """The keys of a spec that were typed, files by their whole path where `absolute`. Raises UsageError
        for what is no model, no input or no rule."""
        typed: dict[str, Any] = {}
        if self.model is not None:
            typed["model"] = _model(self.model, absolute=absolute)
        if self.inputs:
            typed["inputs"] = [_input(text, absolute=absolute) for text in self.inputs]
        for key in ("rules", "no_rules"):
            if (names := getattr(self, key)) is not None:
                typed[key] = _rules(names, f"--{key.replace('_', '-')}")
        for key in ("discover", "target", "remove_idle", "allow_restructure", "bake", "shared"):
            if value := getattr(self, key):
                typed[key] = value
        if self.qat is not None:
            typed["qat"] = self.qat
        if self.eps is not None:
            typed["assume"] = {"eps": self.eps}
        if self.exclude:
            typed["exclude"] = list(self.exclude)
        verify = {"assume_same_path": self.assume_same_path, "memory": self.memory}
        if chosen := {key: value for key, value in verify.items() if value}:
            typed["verify"] = chosen
        if self.quantize:
            typed["quantize"] = dict(self.quantize)
        return typed


def spec_from_options(path: Path | None, options: Typed = Typed()) -> Spec:
    """The spec in the file at `path`, or an empty one, with what was typed in place of what it says.

    Raises UsageError for what is no model or no input.
    """
    typed = options.entries(absolute=path is not None)
    given = spec_from_mapping(typed, where="the command line")
    if path is None:
        return given
    read = read_spec(path)
    update = {name: getattr(given, name) for name in typed}
    # Each by itself: a threshold that is typed leaves the spec's calibration as it is.
    for part in ("verify", "quantize"):
        if part in typed:
            chosen = {name: getattr(update[part], name) for name in typed[part]}
            update[part] = getattr(read, part).model_copy(update=chosen)
    return read.model_copy(update=update)


def _rules(names: str, option: str) -> list[str]:
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found:
        raise UsageError(Problem(f"'{names}' names no rule", option, "'fusecli rules' lists all"))
    return found


def _model(text: str, *, absolute: bool) -> dict[str, Any]:
    found = _CALL.fullmatch(text.strip())
    if found is None:
        fix = "write pkg.module:factory, net.py:Net or net.py:Net(width=8)"
        raise UsageError(Problem(f"'{text}' names no factory", "--model", fix))
    source, _, name = found["factory"].rpartition(":")
    if absolute and source.endswith(".py"):
        source = str(Path(source).resolve())
    return {"factory": f"{source}:{name}", "kwargs": _kwargs(found["kwargs"] or "", text)}


def _kwargs(text: str, whole: str) -> dict[str, Any]:
    """Literals only: nothing that is typed here is run."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("keyword arguments only")
        names = [keyword.arg for keyword in call.keywords]
        if None in names or len({*names}) < len(names):
            raise ValueError("keyword arguments only, each of them once")
        return {str(keyword.arg): _plain(ast.literal_eval(keyword.value)) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        fix = "write keyword arguments with plain values: net.py:Net(width=8, name='small')"
        raise UsageError(
            Problem(f"the arguments of '{whole}' cannot be read: {error}", "--model", fix)
        ) from None


def _plain(value: Any) -> Any:
    """`value`, if a spec can say it; raises ValueError."""
    if isinstance(value, list | tuple | dict):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _plain(item)
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"a {type(value).__name__} is no plain value")
    return value


def _input(text: str, *, absolute: bool) -> dict[str, Any]:
    """The entry that `text` is; names with commas between them are a dict, one name has a comma behind it."""
    first, *others = _COMMA.split(text)
    if not others or not _NAMED.match(first):
        return _tensor(text, absolute=absolute)
    found: dict[str, Any] = {}
    for part in [first, *filter(None, others)]:
        entry = _tensor(part, absolute=absolute)
        name = entry.pop("name", None)
        if name is None or name in found:
            what = f"'{name}' is given twice" if name else f"'{part}' has no name"
            fix = "write a dict as image=1x3x8x8,mask=1x8x8:bool"
            raise UsageError(Problem(what, "--input", fix))
        found[name] = entry
    return found


def _tensor(text: str, *, absolute: bool) -> dict[str, Any]:
    if (read := _FILE.fullmatch(text)) is not None:
        file = str(Path(read["file"]).resolve()) if absolute else read["file"]
        return _without_none({**read.groupdict(), "file": file})
    found = _INPUT.fullmatch(text)
    if found is None:
        fix = "write 2x3x224x224, 2x16:int64:0..1000, mask=2x16:bool or samples.safetensors:images"
        raise UsageError(Problem(f"'{text}' describes no tensor", "--input", fix))
    entry: dict[str, Any] = {"shape": [int(size) for size in found["shape"].split("x")]}
    if found["low"] is not None:
        entry["range"] = [_number(found["low"], text), _number(found["high"], text)]
    return entry | _without_none({"dtype": found["dtype"], "name": found["name"]})


def _number(text: str, whole: str) -> int | float:
    try:
        return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
    except ValueError:
        fix = "write low..high: 0..1000, -1.5..1.5"
        raise UsageError(Problem(f"'{whole}' has no range", "--input", fix)) from None


def _without_none(entries: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if value is not None}
