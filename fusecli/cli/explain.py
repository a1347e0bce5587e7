"""`fusecli explain`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.text import Text

from fusecli.cli import reference
from fusecli.reasons import FAMILIES, REASONS


def explain(
    code: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            help="A reason code of a report, to read all about it.",
            autocompletion=lambda: [*REASONS],
        ),
    ] = None,
) -> None:
    """List why a group is refused or a norm stays, or explain one code: what it prevents, and the remedy."""
    console = Console()
    if code is None:
        width = max(map(len, REASONS))
        for family, reasons in FAMILIES.items():
            rows = ((reason.code, reason.meaning) for reason in reasons)
            reference.print_list(console, (family, "what was seen"), rows, width)
            console.print()
        console.print(Text("'fusecli explain CODE' says why, and what to do."))
        return
    reference.require_known(code, REASONS, kind="reason code", command="fusecli explain")
    reason = REASONS[code]
    reference.print_page(console, code, reason.meaning, (("Why", reason.why), ("Remedy", reason.remedy)))
