"""What a command shows besides its report: problems, progress and questions, all on stderr."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

from rich.console import Console
from rich.text import Text

from fusecli.errors import FusecliError
from fusecli.report import visible

ISSUES = "the issue tracker of fusecli"


def print_problems(error: FusecliError, console: Console) -> None:
    """Every problem as where: what, and how to mend it on a line of its own."""
    for problem in error.problems:
        line = Text.assemble(("error", "bold red"), ": ")
        if problem.where:
            line.append(f"{visible(problem.where)}: ", "bold")
        line.append(visible(problem.what))
        console.print(line, soft_wrap=True)
        if problem.fix:
            console.print(Text.assemble(("  fix", "cyan"), f": {visible(problem.fix)}"), soft_wrap=True)


def print_bug(console: Console, debug: bool) -> None:
    """An error of ours: said as such, with what a report needs."""
    if debug:
        traceback.print_exc()
    error = sys.exc_info()[1]
    summary = visible(f"{type(error).__name__}: {error}")
    console.print(Text.assemble(("internal error", "bold red"), f": {summary}"), soft_wrap=True)
    advice = f"This is a bug in fusecli {version('fusecli')}. Please report it to {ISSUES}"
    console.print(Text(f"{advice}, with the output of the same command and --debug."), soft_wrap=True)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done, on a terminal only."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with console.status("starting") as status:
        yield lambda step: status.update(Text(visible(step)))


def asker() -> Callable[[str], bool] | None:
    """A question about code that nobody has allowed yet; None where nobody is there to answer."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None

    def ask(code: str) -> bool:
        console = Console(stderr=True)
        console.print(Text(f"The spec names Python code of {visible(code)}. Running it means trusting it."))
        console.print(Text("Run it? [y/N] "), end="")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    return ask
