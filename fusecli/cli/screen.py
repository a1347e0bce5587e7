"""What a command shows besides its report: problems, progress and questions, all on stderr."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.status import Status
from rich.text import Text

from fusecli.errors import ExitCode, FusecliError
from fusecli.outcome import Outcome
from fusecli.plain import visible

ISSUES = "the issue tracker of fusecli"


def print_problems(error: FusecliError, console: Console) -> None:
    """Every problem as where: what, and how to mend it on a line of its own."""
    for problem in error.problems:
        line = Text.assemble(("error", "bold red"), ": ")
        if problem.where:
            line.append(f"{visible(problem.where)}: ", "bold")
        line.append(visible(problem.what))
        _print(console, line)
        if problem.fix:
            _print(console, Text.assemble(("  fix", "cyan"), f": {visible(problem.fix)}"))


def print_reasons(outcome: Outcome, console: Console) -> None:
    """Why the work did not succeed, a line each: all that --quiet lets through."""
    if outcome.exit_code is ExitCode.OK:
        return
    refused = [f"{' + '.join(no.group)}: {no.code}: {no.reason}" for no in outcome.refused]
    doubts = outcome.verification.reasons if outcome.verification is not None else ()
    for reason in (*outcome.problems, *refused, *doubts):
        _print(console, Text.assemble((outcome.status, "bold red"), f": {visible(reason)}"))


def print_bug(console: Console, debug: bool) -> None:
    """An error of ours: said as such, with what a report needs."""
    if debug:
        traceback.print_exc()
    error = sys.exc_info()[1]
    from importlib.metadata import version

    summary = visible(f"{type(error).__name__}: {error}")
    _print(console, Text.assemble(("internal error", "bold red"), f": {summary}"))
    advice = f"This is a bug in fusecli {version('fusecli')}. Please report it to {ISSUES}"
    _print(console, Text(f"{advice}, with the output of the same command and --debug."))


def _print(console: Console, line: Text) -> None:
    """Wrapped between words for a reader; in a pipe or a log a message stays one line."""
    console.print(line, soft_wrap=not console.is_terminal)


@dataclass(frozen=True)
class Dialogue:
    """A line that says what is being done, and questions, for which that line makes room."""

    console: Console
    status: Status | None

    def progress(self, step: str) -> None:
        if self.status is not None:
            self.status.update(Text(visible(step)))

    @property
    def asker(self) -> Callable[[str], bool] | None:
        """Asks about code that nobody has allowed yet; None where nobody is there to answer."""
        return self._ask if self._answers else None

    @property
    def truster(self) -> Callable[[str], bool] | None:
        """Asks whether a project may allow code of its own; None where nobody is there to answer."""
        return self._trust if self._answers else None

    @property
    def _answers(self) -> bool:
        # The streams themselves: what colours are wanted (FORCE_COLOR) says nothing of who is there.
        return sys.stdin is not None and sys.stdin.isatty() and self.console.file.isatty()

    def _ask(self, code: str) -> bool:
        told = f"The spec names Python code of {visible(code)}. To run it is to trust it."
        return self._said_yes(told, "Run it?")

    def _trust(self, question: str) -> bool:
        return self._said_yes("A folder may not speak for itself; a yes is remembered.", question)

    def _said_yes(self, told: str, question: str) -> bool:
        if self.status is not None:
            self.status.stop()
        self.console.print(Text(told))
        self.console.print(Text(f"{question} [y/N] "), end="")
        answer = sys.stdin.readline().strip().lower() in ("y", "yes")
        if self.status is not None:
            self.status.start()
        return answer


@contextmanager
def dialogue(quiet: bool) -> Iterator[Dialogue]:
    """What a command says while it works: nothing unless on a terminal, and if quiet only its questions."""
    # This very stream: what a library prints is kept off it by putting another in its place for a while.
    console = Console(file=sys.stderr)
    if quiet or not console.is_terminal:
        yield Dialogue(console, None)
        return
    with console.status("starting") as status:
        yield Dialogue(console, status)


class Terminal(Console):
    """A console that leaves it to the caller what a reader who has gone means: rich exits with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Inside, whoever reads our stdout may close it (`| head`): that changes nothing of the work."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter must not complain while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
