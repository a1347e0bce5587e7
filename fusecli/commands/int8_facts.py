"""What an int8 file says of itself, read without running any of it."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from fusecli.checkpoint import Checkpoint
from fusecli.errors import Problem, UnsafeError
from fusecli.rewrite import MANIFEST_KEY
from fusecli.spec.quantize import Observer, Weights

VERSION = 1
PT2_FACTS = "fusecli.json"  # the extra file of a .pt2 that holds the facts
_MOST_FACTS = 1 << 26  # bytes: more than a name for each op of any graph, and no bomb
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHOICES = {"observer": get_args(Observer), "weights": get_args(Weights)}


def facts_in(artifact: Checkpoint) -> dict[str, Any] | None:
    """What an int8 safetensors file says of itself; None for any other file.

    Raises UnsafeError where what it says is damaged, or of another version.
    """
    return _read(artifact.metadata.get(MANIFEST_KEY), artifact.path)


def facts_inside(path: Path) -> dict[str, Any] | None:
    """The same of a .pt2 file, which is no checkpoint. Nothing in it is run."""
    return _read(_text_inside(path), path)


def is_archive(path: Path) -> bool:
    """Whether the int8 file at `path` is a .pt2, by what is in it: its name may say anything."""
    return zipfile.is_zipfile(path)


def _text_inside(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = (e for e in archive.infolist() if e.filename.endswith(f"/extra/{PT2_FACTS}"))
            entry = next(entries, None)
            if entry is None or entry.file_size > _MOST_FACTS:
                return None
            return archive.read(entry).decode()
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None


def _read(text: str | None, path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or document.get("mode") != "int8":
        return None
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        what = f"its facts about int8 have version {version!r}, this fusecli reads {VERSION}"
        fix = "use the fusecli that wrote it, or quantize again"
        raise UnsafeError(Problem(what, str(path), fix))
    damaged = next((name for name, sound in _soundness(document) if not sound), None)
    if damaged is not None:
        what = f"what it says of itself is damaged: {damaged}"
        raise UnsafeError(Problem(what, str(path), "quantize the checkpoint again"))
    return document


def _soundness(said: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Each fact that is used, and whether it is of the type that was written."""
    for name in ("equalize", "correct_bias"):
        yield name, isinstance(said.get(name), bool)
    for name in ("input_sha256", "calibration_sha256"):
        digest = said.get(name)
        optional = name == "calibration_sha256" and digest is None  # of a file that an earlier fusecli wrote
        yield name, optional or (isinstance(digest, str) and _SHA256.fullmatch(digest) is not None)
    yield "ops", _texts(said.get("ops"))
    inner = said.get("int8")
    yield "int8", isinstance(inner, dict)
    if isinstance(inner, dict):
        yield "options", _chosen(inner.get("options"))
        yield "units", _units(inner.get("units"))


def _chosen(options: Any) -> bool:
    if not isinstance(options, dict) or options.keys() != _CHOICES.keys():
        return False
    return all(options[name] in choices for name, choices in _CHOICES.items())


def _units(units: Any) -> bool:
    if not isinstance(units, list):
        return False
    return all(isinstance(unit, dict) and _texts(unit.get("nodes")) for unit in units)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
