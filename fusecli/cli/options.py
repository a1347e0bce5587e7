"""The options that commands share; the help text of each stands here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

_CODE, _PROOF, _REPORT = "Trust", "Verification", "Report"

Checkpoint = Annotated[Path, typer.Argument(help="The checkpoint to read; it is never changed.")]
AllowCode = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer on Python 3.10 reads the annotation at run time)
    typer.Option(
        "--allow-code",
        metavar="PKG|FILE.py",
        help="Code that the spec may name and fusecli may run. Repeatable.",
        rich_help_panel=_CODE,
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Load pickles that run code while they load, such as whole modules. Only for files you trust.",
        rich_help_panel=_CODE,
    ),
]
Seed = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        help="Seed of the random inputs, instead of the spec's.", min=0, max=2**63 - 1, rich_help_panel=_PROOF
    ),
]
Samples = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Number of random inputs, instead of the spec's.", min=1, rich_help_panel=_PROOF),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Count as inconclusive what was only claimed or assumed, lost hooks and untrained statistics.",
        rich_help_panel=_PROOF,
    ),
]
Report = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--report",
        metavar="json=PATH|md=PATH",
        help="Also write the report there, on failure too; PATH '-' is stdout. Repeatable.",
        rich_help_panel=_REPORT,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=_REPORT)]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show Python tracebacks with errors.", rich_help_panel=_REPORT)
]
