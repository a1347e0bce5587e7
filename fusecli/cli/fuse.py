"""`fusecli fuse`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer

from fusecli.cli import options
from fusecli.cli.command import Choosing, command
from fusecli.outcome import Outcome

if TYPE_CHECKING:
    from fusecli.consent import Consent
    from fusecli.spec import Spec


@dataclass(frozen=True, kw_only=True)
class FuseOptions(Choosing):
    """The options of `fusecli fuse`."""

    name = "fuse"

    discover: Annotated[
        bool,
        typer.Option(
            "--discover", help="Fuse what a run of the model shows to be sound, besides the spec's groups."
        ),
    ] = False
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output", "-o", help="The file to write. Default: <stem>.fused.safetensors beside the input."
        ),
    ] = None
    format: Annotated[
        Optional[Literal["safetensors", "pt"]],  # noqa: UP045
        typer.Option(
            "--format", help="The format to write. Default: what the output's name says, else safetensors."
        ),
    ] = None
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything, exit the same way, but leave no file.")
    ] = False
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="Leave out groups that fail verification, write the rest, exit 1."),
    ] = False
    require_all: Annotated[
        bool, typer.Option("--require-all", help="Fail (exit 4) if a norm is left that could be folded.")
    ] = False
    min_folded: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--min-folded",
            metavar="PERCENT",
            min=0,
            max=100,
            help="Fail (exit 4) if less of the norms with running statistics is folded.",
        ),
    ] = None
    qat: options.Qat = None
    eps: options.Eps = None
    samples: options.Samples = None
    strict: options.Strict = False
    memory: options.Memory = None


@command(FuseOptions)
def fuse(given: FuseOptions) -> None:
    """Fuse a checkpoint, prove that it computes the same, and write it.

    Nothing is written unless the proof succeeds: fusecli fuse model.pt --spec fuse.yaml, or without a spec:
    fusecli fuse model.pt --discover --model net.py:Net --input 1x3x224x224
    """

    def work(spec: Spec, consent: Consent, progress: Callable[[str], None]) -> Outcome:
        from fusecli.commands.fuse import FuseRequest, fuse_file

        return fuse_file(given.picked(FuseRequest, spec=spec, **given.words), consent, progress)

    given.run(given.reports(given.output), work)
