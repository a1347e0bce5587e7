"""`fusecli rules`."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.text import Text

from fusecli.errors import Problem, UsageError


def rules(
    name: Annotated[Optional[str], typer.Argument(help="A rule, to read all about it.")] = None,  # noqa: UP045
) -> None:
    """List the rules, or explain one: what it fuses, its equation, when it is exact and when it refuses."""
    from rich.table import Table

    from fusecli import rules as folder

    console = Console()
    if name is None:
        table = Table("rule", "what it does", box=None, pad_edge=False, header_style="bold")
        for rule in folder.names():
            table.add_row(Text(rule, "cyan"), Text(folder.describe(rule).partition("\n")[0]))
        console.print(table)
        console.print(Text("\n'fusecli rules NAME' explains one."))
        return
    if name not in folder.names():
        near = get_close_matches(name, folder.names(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else "'fusecli rules' lists all"
        raise UsageError(Problem(f"rule '{name}' is unknown", "", hint))
    summary, _, sections = folder.describe(name).partition("\n\n")
    console.print(Text(name, "bold cyan"))
    console.print(Text(summary), end="\n\n")
    page = Table.grid(padding=(0, 3, 0, 0))
    for label, text in _sections(sections):
        page.add_row(Text(label, "bold", no_wrap=True), Text(text))
    console.print(page)


def _sections(text: str) -> list[tuple[str, str]]:
    """(label, text) of a docstring's lines `Label   text`, which go on in indented lines."""
    found = re.findall(r"^(\S.*?)\s{2,}(.+(?:\n\s+.+)*)", text, re.MULTILINE)
    return [(label, " ".join(words.split())) for label, words in found]
