"""`fusecli inspect`."""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from fusecli.cli import options
from fusecli.errors import FusecliError
from fusecli.outcome import Outcome

if TYPE_CHECKING:
    from fusecli.contents import Contents


def inspect(
    checkpoint: options.Checkpoint,
    key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--key", help="Which state dict to show where the file holds several, as a dotted key."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
    debug: options.Debug = False,
) -> None:
    """Show what is in a checkpoint and what fusing it would take; nothing in it is executed.

    The pairs it proposes are guesses from names, key order and shapes; only a run of the model confirms one.
    """
    from fusecli.report import as_json, contents_as_json, print_contents

    try:
        contents = _inspected(checkpoint, key)
    except FusecliError as error:
        if json:
            problems = tuple(str(problem) for problem in error.problems)
            sys.stdout.write(as_json(Outcome("inspect", "error", error.exit_code, problems=problems)))
        raise
    if json:
        sys.stdout.write(contents_as_json(contents))
    else:
        command = shlex.join(["fusecli", "fuse", str(checkpoint), "--spec", "fuse.yaml", "--dry-run"])
        print_contents(contents, Console(), command)


def _inspected(checkpoint: Path, key: str | None) -> Contents:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fusecli.commands.inspect import inspect_file

        return inspect_file(checkpoint, key)
