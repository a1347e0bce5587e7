"""`fusecli verify`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from fusecli.cli import options
from fusecli.cli.command import Given, command
from fusecli.outcome import Outcome

if TYPE_CHECKING:
    from fusecli.consent import Consent
    from fusecli.spec import Spec


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Given):
    """The options of `fusecli verify`."""

    name = "verify"

    fused: Annotated[Path, typer.Argument(help="The artifact that fusecli made of it.")]
    spec: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--spec", "-s", help="The spec, where the model is to be built and run."),
    ] = None
    threshold: options.Threshold = None
    samples: options.Samples = None
    strict: options.Strict = False
    memory: options.Memory = None
    assume_same_path: options.SamePath = False

    @property
    def quantize(self) -> dict[str, Any] | None:
        return {"threshold": options.lines(self.threshold)} if self.threshold is not None else None


@command(VerifyOptions)
def verify(given: VerifyOptions) -> None:
    """Prove again, from the files, that an artifact computes what the checkpoint does.

    With the spec, or --model and --input, the model is run, end to end. Without, each group is judged by
    itself, by its tensors.
    """

    def work(spec: Spec, consent: Consent, progress: Callable[[str], None]) -> Outcome:
        from fusecli.commands.verify import VerifyRequest, verify_file

        known = given.spec is not None or given.model is not None
        request = given.picked(VerifyRequest, spec=spec if known else None)
        return verify_file(request, consent, progress)

    given.run(given.reports(given.fused), work)
