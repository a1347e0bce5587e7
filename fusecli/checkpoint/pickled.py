"""Checkpoints of torch.save: explained before they are loaded, loaded by the safe unpickler.

Order matters. The archive and the pickle are checked as data first, so that a damaged file, a program or
a hostile pickle is named in one sentence; torch.load runs last and gets weights_only=True unless the user
has said --allow-pickle.
"""

from __future__ import annotations

import pickle
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from mmap import MAP_PRIVATE
from pathlib import Path
from typing import Any

import torch
from torch.serialization import SourceChangeWarning, set_default_mmap_options

from fusecli.checkpoint.archive import open_archive
from fusecli.checkpoint.consent import explain_failure, explain_refusal
from fusecli.checkpoint.scan import Scan, scan_pickle
from fusecli.checkpoint.sniff import Kind
from fusecli.checkpoint.trouble import DOWNLOAD_AGAIN, unreadable
from fusecli.consent import Consent

# magic number, protocol, system, the object, the storage keys; then the storages themselves
_LEGACY_PICKLES = 5
_LEGACY_COUNT = 8


@dataclass(frozen=True)
class Loaded:
    """The object that stood in the file, and what loading it changed."""

    root: Any
    notices: tuple[str, ...]


def load_pickled(path: Path, kind: Kind, allow_pickle: bool, consent: Consent | None = None) -> Loaded:
    """The file's object with every tensor on the CPU; zip archives are mapped, not read.

    Raises UnsafeError for whatever cannot be loaded, or not without --allow-pickle.
    """
    scan = _SCANS[kind](path)
    if kind is Kind.PICKLE and not allow_pickle:
        raise explain_refusal(path, scan, None)
    lent = consent.lending(scan.globals) if consent and allow_pickle else nullcontext()
    with lent, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        root = _load(path, kind, allow_pickle, scan)
    changed = (str(w.message).split(".  ")[0] for w in caught if w.category is SourceChangeWarning)
    return Loaded(root, (*_devices(scan), *(text.splitlines()[0] for text in changed)))


def _load(path: Path, kind: Kind, allow_pickle: bool, scan: Scan) -> Any:
    try:
        return _read_plain(path) if kind is Kind.PICKLE else _read_torch(path, kind, not allow_pickle)
    except Exception as error:  # a pickle may raise anything, and with consent runs anybody's code
        if allow_pickle or not isinstance(error, pickle.UnpicklingError):
            raise explain_failure(path, error) from None
        raise explain_refusal(path, scan, error) from None


def _read_torch(path: Path, kind: Kind, weights_only: bool) -> Any:
    # torch.load hands a *path* that ends in .safetensors to another reader, whatever the file holds.
    if kind is Kind.ZIP and path.suffix != ".safetensors":
        with set_default_mmap_options(MAP_PRIVATE):
            return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=weights_only)


def _read_plain(path: Path) -> Any:
    with path.open("rb") as file:
        return pickle.load(file)


def _scan_zip(path: Path) -> Scan:
    archive = open_archive(path)
    scan = Scan()
    _scan_into(path, archive.read_pickle(), scan)
    for block in scan.blocks.values():
        if block.nbytes > archive.sizes.get(f"data/{block.key}", -1) and block.nbytes:
            raise unreadable(
                path, f"the data of its tensor storage {block.key} is incomplete", DOWNLOAD_AGAIN
            )
    return scan


def _scan_legacy(path: Path) -> Scan:
    scan = Scan()
    with path.open("rb") as file:
        for _ in range(_LEGACY_PICKLES - 1):
            _scan_into(path, file, scan)
        root = scan.root
        _scan_into(path, file, scan)
        scan.root = root
        needed = file.tell() + sum(_LEGACY_COUNT + block.nbytes for block in scan.blocks.values())
    size = path.stat().st_size
    if size < needed:
        raise unreadable(path, f"the file was cut off: {size:,} of {needed:,} bytes", DOWNLOAD_AGAIN)
    return scan


def _scan_plain(path: Path) -> Scan:
    scan = Scan()
    with path.open("rb") as file:
        _scan_into(path, file, scan)
    return scan


_SCANS = {Kind.ZIP: _scan_zip, Kind.LEGACY: _scan_legacy, Kind.PICKLE: _scan_plain}


def _scan_into(path: Path, stream: Any, scan: Scan) -> None:
    try:
        scan_pickle(stream, scan)
    except (ValueError, IndexError, AttributeError, RecursionError):
        # pickletools says "not enough data" and "unknown opcode" alike as ValueError
        if not scan.globals and not scan.blocks and scan.root is None and not _pickle_header(path):
            what, fix = "is no checkpoint of any known format", "give a safetensors file or one of torch.save"
            raise unreadable(path, what, fix) from None
        raise unreadable(path, "the pickle is cut off or damaged", DOWNLOAD_AGAIN) from None


def _pickle_header(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")


def _devices(scan: Scan) -> tuple[str, ...]:
    tags = Counter(block.location for block in scan.blocks.values() if block.location != "cpu")
    return tuple(f"{n} tensor storages saved from {tag} were loaded on the CPU" for tag, n in tags.items())
