"""The `fusecli` program: its commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer
from rich.console import Console

from fusecli.cli import explain, fuse, inspect, plan, quantize, rules, schema, verify
from fusecli.cli.screen import print_bug, print_problems
from fusecli.errors import ExitCode, FusecliError

EXIT_CODES = (  # one line: typer keeps the line breaks, the terminal adds its own
    "Exit codes: 0 fused, verified, written; 1 outputs differ, or int8 is below its threshold; 2 usage or "
    "spec error; 3 unsafe or unreadable input; 4 a requested fusion is unsound or unsupported; 5 nothing to "
    "fuse; 6 verification inconclusive; 70 a bug in fusecli."
)

app = typer.Typer(
    name="fusecli",
    help="Fold BatchNorm and friends into the layer beside them, and prove the function unchanged.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    fuse.fuse,
    verify.verify,
    plan.plan,
    quantize.quantize,
    inspect.inspect,
    rules.rules,
    explain.explain,
    schema.schema,
):
    app.command(
        epilog=EXIT_CODES if command in (fuse.fuse, verify.verify, plan.plan, quantize.quantize) else None
    )(command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # 20 ms that no other call needs

        typer.echo(f"fusecli {version('fusecli')}")
        raise typer.Exit


@app.callback()
def _program(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the program; a mistake of the user ends in what, where, fix, and never in a traceback."""
    # pydantic would look through every installed package for plugins, which takes longer than reading a spec.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # Before torch reads it: threads that wait for each other sleep. Where they spin, on a machine that does
    # something else too, a layer takes ten times as long: they keep the others from working.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    errors = Console(stderr=True)
    debug = "--debug" in sys.argv
    try:
        app()
    except FusecliError as error:
        if debug:
            traceback.print_exc()
        print_problems(error, errors)
        sys.exit(error.exit_code)
    except Exception:
        print_bug(errors, debug)
        sys.exit(ExitCode.BUG)
