"""`fusecli rules`."""

from __future__ import annotations

import re
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.text import Text

from fusecli import rules as folder
from fusecli.cli import reference


def rules(
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="A rule, to read all about it.", autocompletion=folder.names),
    ] = None,
) -> None:
    """List the rules, or explain one: what it fuses, its equation, when it is exact and when it refuses."""
    console = Console()
    if name is None:
        rows = ((rule, folder.describe(rule).partition("\n")[0]) for rule in folder.names())
        reference.print_list(console, ("rule", "what it does"), rows)
        console.print(Text("\n'fusecli rules NAME' explains one."))
        return
    reference.require_known(name, folder.names(), kind="rule", command="fusecli rules")
    summary, _, sections = folder.describe(name).partition("\n\n")
    reference.print_page(console, name, summary, _sections(sections))


def _sections(text: str) -> list[tuple[str, str]]:
    """(label, text) of a docstring's lines `Label   text`, which go on in indented lines."""
    found = re.findall(r"^(\S.*?)\s{2,}(.+(?:\n\s+.+)*)", text, re.MULTILINE)
    return [(label, " ".join(words.split())) for label, words in found]
