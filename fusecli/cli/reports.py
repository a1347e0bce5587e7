"""Where reports go: one rendering for the terminal, and a file for each --report."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from fusecli.errors import ExitCode, FusecliError, Problem, UsageError
from fusecli.outcome import Outcome
from fusecli.report import as_json, as_markdown, print_terminal

_FORMATS: dict[str, Callable[[Outcome], str]] = {"json": as_json, "md": as_markdown}
_STDOUT = "-"


@dataclass(frozen=True)
class Reports:
    """The reports that were asked for, as (format, path)."""

    wanted: tuple[tuple[str, str], ...]
    quiet: bool

    @classmethod
    def parse(cls, words: Sequence[str], quiet: bool, inputs: Sequence[Path | None]) -> Reports:
        """Raises UsageError for a word that is no FORMAT=PATH, and for a path that is an input."""
        wanted = []
        for word in words:
            fmt, _, path = word.partition("=")
            if fmt not in _FORMATS or not path:
                fix = "write json=PATH or md=PATH; '-' as PATH is stdout"
                raise UsageError(Problem(f"'{word}' is no report", "--report", fix))
            for source in filter(None, inputs):
                if path != _STDOUT and Path(path).exists() and source.exists() and Path(path).samefile(source):
                    raise UsageError(Problem("a report cannot replace an input", path, "choose another path"))
            wanted.append((fmt, path))
        if sum(path == _STDOUT for _, path in wanted) > 1:
            raise UsageError(Problem("only one report can go to stdout", "--report", "give the others a path"))
        return cls(tuple(wanted), quiet)

    def deliver(self, outcome: Outcome) -> None:
        """Prints and writes the outcome in every rendering."""
        taken = any(path == _STDOUT for _, path in self.wanted)
        for fmt, path in self.wanted:
            text = _FORMATS[fmt](outcome)
            if path == _STDOUT:
                sys.stdout.write(text)
                sys.stdout.flush()
            else:
                _write(Path(path), text)
        if not self.quiet:
            # stdout carries the one report that was asked for; the terminal's own then goes to stderr.
            print_terminal(outcome, Console(stderr=taken))


def finish(command: str, reports: Reports, work: Callable[[], Outcome]) -> None:
    """Does the work, delivers its outcome, and exits with its code; errors are reported too."""
    try:
        outcome = work()
    except FusecliError as error:
        failed = Outcome(command, "error", error.exit_code, problems=tuple(str(p) for p in error.problems))
        Reports(reports.wanted, quiet=True).deliver(failed)
        raise
    reports.deliver(outcome)
    if outcome.exit_code is not ExitCode.OK:
        raise typer.Exit(int(outcome.exit_code))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            Problem(f"the report cannot be written ({error.strerror})", str(path), "choose another path")
        ) from error
