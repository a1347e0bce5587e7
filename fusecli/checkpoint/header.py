"""The header of a safetensors file, believed only after every number in it was checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from fusecli.checkpoint.dtypes import DTYPES
from fusecli.checkpoint.trouble import DOWNLOAD_AGAIN, unreadable

LENGTH_BYTES = 8
LIMIT = 100_000_000  # the library's own limit
_REWRITE = "write the file again with the safetensors library"


@dataclass(frozen=True)
class Entry:
    """One tensor's dtype, shape and place, in bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The tensors in the order of their data, and the free-form metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The checked header; UnsafeError if anything in it is out of range, doubled or cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if length > LIMIT:
            raise unreadable(path, f"the safetensors header is oversized ({length:,} bytes)", DOWNLOAD_AGAIN)
        if LENGTH_BYTES + length > size:
            raise unreadable(path, "the file was cut off inside the safetensors header", DOWNLOAD_AGAIN)
        raw = file.read(length)
    document = parse_json(path, raw, "safetensors header")
    metadata = document.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise unreadable(path, "the safetensors metadata must map text to text", _REWRITE)
    origin = LENGTH_BYTES + length
    entries = {name: _entry(path, name, value, origin) for name, value in document.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_layout(path, ordered, origin, size)
    return Header(ordered, metadata)


def parse_json(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys: readers disagree on which of two equal keys counts."""
    try:
        document = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"the {what} is not valid JSON ({error})", DOWNLOAD_AGAIN) from None
    if not isinstance(document, dict):
        raise unreadable(path, f"the {what} is not a JSON object", _REWRITE)
    return document


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key '{key}'")
        result[key] = value
    return result


def _entry(path: Path, name: str, value: Any, origin: int) -> Entry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise unreadable(path, f"the header entry of tensor '{name}' is malformed", _REWRITE)
    if dtype not in DTYPES:
        fix = "convert the tensor to a dtype that this torch has"
        raise unreadable(path, f"tensor '{name}' has the unsupported dtype '{dtype}'", fix)
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise unreadable(path, f"the offsets of tensor '{name}' do not fit its shape and dtype", _REWRITE)
    return Entry(DTYPES[dtype], tuple(shape), origin + start, origin + stop)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(path: Path, entries: dict[str, Entry], origin: int, size: int) -> None:
    """Data without gaps, overlaps or remains, as the format demands: nothing hides between tensors."""
    position = origin
    for name, entry in entries.items():
        if entry.start != position:
            flaw = "overlaps another tensor" if entry.start < position else "leaves a gap before it"
            raise unreadable(path, f"the data of tensor '{name}' {flaw}", _REWRITE)
        position = entry.stop
    if position > size:
        raise unreadable(path, f"the file was cut off: {size:,} of {position:,} bytes", DOWNLOAD_AGAIN)
    if position < size:
        raise unreadable(path, f"{size - position:,} bytes follow the last tensor", _REWRITE)
