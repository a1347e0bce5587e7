"""Atomic output: a temporary file beside the target, renamed over it only when everything was right."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fusecli.checkpoint.trouble import misused, unreadable
from fusecli.errors import FusecliError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NAME_BYTES = 200  # of 255 in a file name: room for the random part


def check_target(target: Path, source: Path, force: bool, protected: Sequence[Path] = ()) -> None:
    """Nothing, if the target may be written. To be called before any work.

    Raises UsageError if it is the input (`source`) or another file that is read (`protected`), a folder,
    exists without force, or cannot be created; UnsafeError if it is a symbolic link.
    """
    for read in (source, *protected):
        if target.exists() and read.exists() and target.samefile(read):
            raise misused(
                target, f"the output is the input '{read}'", "choose another output: inputs stay as is"
            )
    if target.is_symlink():
        what = f"the output is a symbolic link to '{target.readlink()}'"
        raise unreadable(target, what, "give the path of the file itself")
    if target.is_dir():
        raise misused(target, "the output is a folder", "give a file name inside it")
    if target.exists() and not target.is_file():
        raise misused(target, "the output is no ordinary file", "give the path of a file")
    if target.exists() and not force:
        raise misused(target, "the output exists already", "use --force to replace it")
    _check_folder(target)


def _check_folder(target: Path) -> None:
    folder = target.parent
    if not folder.is_dir():
        raise misused(target, f"the folder '{folder}' does not exist", "create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(target, "permission denied")


@dataclass(frozen=True)
class Staged:
    """A temporary file (`path`) that becomes the target at `commit` and vanishes without it."""

    path: Path
    target: Path
    source: Path
    force: bool
    protected: tuple[Path, ...] = ()

    def commit(self) -> None:
        """Puts the file at the target, whole and on disk; a reader sees the old file or the new one."""
        check_target(self.target, self.source, self.force, self.protected)
        _sync(self.path)
        self.path.replace(self.target)
        _sync(self.target.parent)


@contextmanager
def staged(target: Path, force: bool, source: Path, protected: Sequence[Path] = ()) -> Iterator[Staged]:
    """A file to write beside the target. Leaving the block without `commit` removes it."""
    check_target(target, source, force, protected)
    temporary = _create_beside(target)
    try:
        yield Staged(temporary, target, source, force, tuple(protected))
    except FusecliError as error:  # nobody knows the temporary name
        named = (replace(p, where=p.where.replace(str(temporary), str(target))) for p in error.problems)
        raise type(error)(*named) from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        what = f"the file could not be written ({error.strerror}); nothing was left behind"
        raise misused(target, what, "free some space, or choose an output on another disk") from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _create_beside(target: Path) -> Path:
    """A new empty file with the usual permissions (tempfile would make it private)."""
    stem = os.fsdecode(os.fsencode(target.name)[:_NAME_BYTES])
    path = target.with_name(f".{stem}.{secrets.token_hex(6)}.tmp")
    try:
        path.touch(mode=0o666, exist_ok=False)
    except OSError as error:
        raise _unwritable(target, error.strerror or "unknown reason") from None
    return path


def _unwritable(target: Path, reason: str) -> Exception:
    what = f"the folder '{target.parent}' cannot be written ({reason})"
    return misused(target, what, "change its permissions or choose another output")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
