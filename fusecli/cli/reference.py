"""A list of names, a page on each, and the nearest one: what `rules` and `explain` have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusecli.errors import Problem, UsageError


def require_known(name: str, names: Iterable[str], *, kind: str, command: str) -> None:
    """Raises UsageError, with the nearest name, unless `name` is one of `names`; `command` lists them."""
    known = list(names)
    if name in known:
        return
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"'{command}' lists all"
    raise UsageError(Problem(f"{kind} '{name}' is unknown", "", hint))


def print_list(console: Console, head: Sequence[str], rows: Iterable[Sequence[str]], width: int = 0) -> None:
    """A column of names, at least `width` wide, and what they are in a few words, in one or more columns."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(head[0], min_width=width, no_wrap=True)
    for title in head[1:]:
        table.add_column(title, no_wrap=title != head[-1])
    for name, *texts in rows:
        table.add_row(Text(name, "cyan"), *map(Text, texts))
    console.print(table)


def print_page(console: Console, name: str, summary: str, sections: Iterable[tuple[str, str]]) -> None:
    """All about one name: a summary, then labelled sections."""
    console.print(Text(name, "bold cyan"))
    console.print(Text(summary), end="\n\n")
    page = Table.grid(padding=(0, 3, 0, 0))
    for label, text in sections:
        page.add_row(Text(label, "bold", no_wrap=True), Text(text))
    console.print(page)
