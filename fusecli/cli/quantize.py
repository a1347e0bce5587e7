"""`fusecli quantize`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from fusecli.cli import options
from fusecli.cli.command import Given, command
from fusecli.outcome import Outcome

if TYPE_CHECKING:
    from fusecli.consent import Consent
    from fusecli.spec import Spec

_INT8 = "Int8"


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Given):
    """The options of `fusecli quantize`."""

    name = "quantize"

    spec: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--spec", "-s", help="The YAML spec: model, inputs, groups, and how to quantize."),
    ] = None
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The file to write. Default: <stem>.int8.pt2 beside the input."),
    ] = None
    format: Annotated[
        Optional[Literal["pt2", "safetensors"]],  # noqa: UP045
        typer.Option(
            "--format",
            help="pt2 can be run by itself; safetensors has the integers, scales and zero points. Default: "
            "what the output's name says, else pt2.",
        ),
    ] = None
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")] = False
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be quantized; calibrate nothing, write nothing."),
    ] = False
    observer: Annotated[
        Optional[Literal["minmax", "histogram"]],  # noqa: UP045
        typer.Option(
            help="Ranges of activations: all that was seen, or what loses least.", rich_help_panel=_INT8
        ),
    ] = None
    weights: Annotated[
        Optional[Literal["per-channel", "per-tensor"]],  # noqa: UP045
        typer.Option(help="A scale for each output channel, or one for each weight.", rich_help_panel=_INT8),
    ] = None
    equalize: Annotated[
        bool,
        typer.Option(
            "--equalize",
            help="First move ranges between layers in a row, through ReLU and the like: the float model "
            "computes the same, int8 loses less.",
            rich_help_panel=_INT8,
        ),
    ] = False
    correct_bias: Annotated[
        bool,
        typer.Option(
            "--correct-bias",
            help="Put into each bias what rounding moves the mean of the layer's output by, as calibration "
            "shows it.",
            rich_help_panel=_INT8,
        ),
    ] = False
    threshold: options.Threshold = None
    bake: options.Bake = False
    eps: options.Eps = None

    @property
    def quantize(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {
            "observer": self.observer,
            "weights": self.weights,
            "equalize": self.equalize or None,
            "correct_bias": self.correct_bias or None,
            "threshold": options.lines(self.threshold) if self.threshold is not None else None,
        }
        return {name: value for name, value in chosen.items() if value is not None}


@command(QuantizeOptions)
def quantize(given: QuantizeOptions) -> None:
    """Fuse a checkpoint, make it int8, and say how like the float model it is.

    Nothing is written unless it meets the spec's threshold: fusecli quantize model.pt --spec quantize.yaml
    """

    def work(spec: Spec, consent: Consent, progress: Callable[[str], None]) -> Outcome:
        from fusecli.commands.quantize import QuantizeRequest, quantize_file

        return quantize_file(given.picked(QuantizeRequest, spec=spec, **given.words), consent, progress)

    given.run(given.reports(given.output), work)
