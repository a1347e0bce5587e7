"""The one way this package says that a file cannot be read: what, where, fix, in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

from fusecli.errors import Problem, UnsafeError, UsageError

DOWNLOAD_AGAIN = "fetch the file again and compare its size with the original"
RESAVE = "save its state dict instead: torch.save(model.state_dict(), 'weights.pt')"

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def unreadable(path: Path, what: str, fix: str) -> UnsafeError:
    """The error for an input that is unsafe or unreadable (exit 3)."""
    return UnsafeError(Problem(what, str(path), fix))


def misused(path: Path, what: str, fix: str) -> UsageError:
    """The error for a command line or spec that does not fit the file (exit 2)."""
    return UsageError(Problem(what, str(path), fix))


def first_line(error: BaseException) -> str:
    """The error's first line without terminal colours: torch explains itself in paragraphs, to developers."""
    lines = _ESCAPE.sub("", str(error)).strip().splitlines()
    text = lines[0].strip().rstrip(".") if lines else ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
