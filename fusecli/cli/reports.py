"""Where reports go: one rendering for the terminal, and a file for each --report."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from fusecli.blame import model_failed
from fusecli.cli.options import trusted
from fusecli.cli.screen import Dialogue, Terminal, print_reasons, reader_may_leave
from fusecli.errors import ExitCode, FusecliError, Problem, UsageError
from fusecli.outcome import FileFacts, Outcome

if TYPE_CHECKING:
    from fusecli.consent import Consent

_FORMATS = ("json", "md")
_STDOUT = "-"
INTERRUPTED = 130


@dataclass(frozen=True)
class Reports:
    """The reports that were asked for, as (format, path); `product` is what else the command prints, and
    `consents` what its reports say of whose code was allowed, and by whom."""

    wanted: tuple[tuple[str, str], ...]
    quiet: bool
    spared: list[Path] = field(default_factory=list)
    product: list[str] = field(default_factory=list)
    consents: list[Consent] = field(default_factory=list)

    @classmethod
    def parse(cls, words: Sequence[str], quiet: bool, files: Sequence[Path | None]) -> Reports:
        """Raises UsageError for what could only fail after the work: a word that is no FORMAT=PATH, a path
        that cannot be written or that is one of the command's own `files`."""
        wanted: list[tuple[str, str]] = []
        for word in words:
            fmt, _, path = word.partition("=")
            if fmt not in _FORMATS or not path:
                fix = "write json=PATH or md=PATH; '-' as PATH is stdout"
                raise UsageError(Problem(f"'{word}' is no report", "--report", fix))
            if path != _STDOUT:
                _check(Path(path), [file for file in files if file is not None])
            if path in (taken for _, taken in wanted):
                place = "stdout" if path == _STDOUT else f"'{path}'"
                raise UsageError(
                    Problem(f"only one report can go to {place}", "--report", "give the others a path")
                )
            wanted.append((fmt, path))
        return cls(tuple(wanted), quiet)

    def spare(self, files: Sequence[Path]) -> None:
        """Raises UsageError if a report would replace one of `files`, such as those that a spec names; not
        even the report of that error goes there."""
        self.spared.extend(files)
        for _, path in self.wanted:
            if path != _STDOUT:
                _check(Path(path), files)

    @property
    def takes_stdout(self) -> bool:
        return any(path == _STDOUT for _, path in self.wanted)

    def consent(self, person: Dialogue, allow_code: list[str] | None, model: str | None) -> Consent:
        """Whose code the command may run, for which the person may be asked."""
        from fusecli.consent import Consent  # with a parser that a slip in the spec need not wait for

        words = trusted(allow_code, model)
        self.consents.append(Consent.gather(words, person.asker, person.truster, by="the command line"))
        return self.consents[-1]

    def deliver(self, outcome: Outcome) -> None:
        """Prints and writes the outcome in every rendering."""
        outcome = self.write(outcome)
        with reader_may_leave():
            sys.stdout.writelines(self.product)
        if self.quiet:
            print_reasons(outcome, Console(stderr=True))
            return
        # stdout carries the one report that was asked for; the terminal's own then goes to stderr.
        taken = self.takes_stdout or bool(self.product)
        from fusecli.report import print_terminal

        with reader_may_leave():
            print_terminal(outcome, Terminal(stderr=taken))

    def write(self, outcome: Outcome) -> Outcome:
        """Every --report of the outcome, to which the code that was allowed belongs; the files first, since
        whoever reads stdout may leave."""
        allowed = (entry for consent in self.consents for entry in consent.ledger)
        outcome = replace(outcome, ledger=(*outcome.ledger, *allowed))
        for fmt, path in sorted(self.wanted, key=lambda report: report[1] == _STDOUT):
            if path != _STDOUT and any(_is_same(Path(path), file) for file in self.spared):
                continue
            text = _rendered(outcome, fmt)
            if path == _STDOUT:
                with reader_may_leave():
                    sys.stdout.write(text)
            else:
                _write(Path(path), text, outcome)
        return outcome


@dataclass(frozen=True)
class Failed:
    """What is known of a command when an error ends it."""

    command: str
    checkpoint: Path
    spec: Path | None

    def outcome(self, code: ExitCode, problems: Sequence[object]) -> Outcome:
        return Outcome(
            self.command,
            "error",
            code,
            input=FileFacts(str(self.checkpoint)),
            spec=FileFacts(str(self.spec), "yaml") if self.spec else None,
            problems=tuple(map(str, problems)),
        )


def finish(failed: Failed, reports: Reports, work: Callable[[], Outcome]) -> None:
    """Does the work, delivers its outcome, and exits with its code; errors are reported too.

    What somebody's model prints meanwhile goes to stderr: stdout carries the report alone.
    """
    try:
        with redirect_stdout(sys.stderr):
            outcome = work()
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing was written", style="yellow")
        raise typer.Exit(INTERRUPTED) from None
    except FusecliError as error:
        reports.write(failed.outcome(error.exit_code, error.problems))
        raise
    except SystemExit as stop:
        # Its code would be taken for ours: 0 for a file that was never written.
        left = UsageError(
            Problem(f"the model's code called sys.exit({stop.code!r})", "model", "take that out")
        )
        reports.write(failed.outcome(left.exit_code, left.problems))
        raise left from None
    except Exception as error:
        if (problem := model_failed(error)) is not None:
            reports.write(failed.outcome(ExitCode.USAGE, [problem]))
            raise UsageError(problem) from error
        # A bug: a program that waits for the report learns of it.
        reports.write(failed.outcome(ExitCode.BUG, [f"{type(error).__name__}: {error}"]))
        raise
    reports.deliver(outcome)
    if outcome.exit_code is not ExitCode.OK:
        raise typer.Exit(int(outcome.exit_code))


def _rendered(outcome: Outcome, fmt: str) -> str:
    # Only now: a slip in the spec is told without the renderings.
    from fusecli.report import as_json, as_markdown

    return as_json(outcome) if fmt == "json" else as_markdown(outcome)


def _check(path: Path, files: Sequence[Path]) -> None:
    for file in files:
        if _is_same(path, file):
            what = "a report cannot replace a file of the command itself"
            raise UsageError(Problem(what, str(path), "choose another path"))
    if path.is_dir():
        raise UsageError(Problem("the report's path is a folder", str(path), "give a file name inside it"))
    if not path.parent.is_dir():
        raise UsageError(Problem(f"the folder '{path.parent}' does not exist", str(path), "create it first"))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _unwritable(path, "permission denied")


def _is_same(path: Path, file: Path) -> bool:
    return path.resolve() == file.resolve() or (path.exists() and file.exists() and path.samefile(file))


def _write(path: Path, text: str, outcome: Outcome) -> None:
    if outcome.output is not None and path.resolve() == Path(outcome.output.path).resolve():
        raise UsageError(Problem("a report cannot replace the artifact", str(path), "choose another path"))
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all; raises UsageError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    if path.exists() and not path.is_file():
        raise _unwritable(path, "it is no ordinary file")  # a device or a pipe would be replaced by one
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path, error.strerror or str(error)) from error


def _unwritable(path: Path, reason: str) -> UsageError:
    return UsageError(Problem(f"it cannot be written ({reason})", str(path), "choose another path"))
