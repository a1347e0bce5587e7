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
    """List the rules and their equations, or explain one: what it fuses, when it is exact or refuses."""
    console = Console()
    if name is None:
        rows = [(rule, *_in_short(rule)) for rule in folder.names()]
        # In the order in which they are tried.
        rows.sort(key=lambda row: (folder.EQUATIONS.index(row[1]), row[0]))
        reference.print_list(console, ("rule", "equation", "what it does"), rows)
        console.print(Text("\n'fusecli rules NAME' explains one; --rules and --no-rules of 'fuse' choose."))
        return
    reference.require_known(name, folder.names(), kind="rule", command="fusecli rules")
    summary, _, sections = folder.describe(name).partition("\n\n")
    reference.print_page(console, name, summary, _sections(sections))


def _in_short(rule: str) -> tuple[str, str]:
    """The equation that a rule is, and its first line."""
    text = folder.describe(rule)
    equation = next((words for label, words in _sections(text) if label == "Equation"), "")
    return (re.findall(r"\w+", equation) or ["none"])[0], text.partition("\n")[0]


def _sections(text: str) -> list[tuple[str, str]]:
    """(label, text) of a docstring's lines `Label   text`, which go on in indented lines."""
    found = re.findall(r"^(\S.*?)\s{2,}(.+(?:\n\s+.+)*)", text, re.MULTILINE)
    return [(label, " ".join(words.split())) for label, words in found]
