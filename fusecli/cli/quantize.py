"""`fusecli quantize`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from fusecli.cli import options
from fusecli.cli.reports import Failed, Reports, finish
from fusecli.cli.screen import dialogue
from fusecli.outcome import Outcome

_INT8 = "Int8"


def quantize(
    checkpoint: options.Checkpoint,
    spec: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--spec", "-s", help="The YAML spec: model, inputs, groups, and how to quantize."),
    ] = None,
    model: options.Model = None,
    inputs: options.Inputs = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The file to write. Default: <stem>.int8.pt2 beside the input."),
    ] = None,
    fmt: Annotated[
        Optional[Literal["pt2", "safetensors"]],  # noqa: UP045
        typer.Option(
            "--format",
            help="pt2 can be run by itself; safetensors has the integers, scales and zero points. Default: "
            "what the output's name says, else pt2.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be quantized; calibrate nothing, write nothing."),
    ] = False,
    observer: Annotated[
        Optional[Literal["minmax", "histogram"]],  # noqa: UP045
        typer.Option(
            help="Ranges of activations: all that was seen, or what loses least.", rich_help_panel=_INT8
        ),
    ] = None,
    weights: Annotated[
        Optional[Literal["per-channel", "per-tensor"]],  # noqa: UP045
        typer.Option(help="A scale for each output channel, or one for each weight.", rich_help_panel=_INT8),
    ] = None,
    equalize: Annotated[
        bool,
        typer.Option(
            "--equalize",
            help="First move ranges between layers in a row, through ReLU and the like: the float model "
            "computes the same, int8 loses less.",
            rich_help_panel=_INT8,
        ),
    ] = False,
    correct_bias: Annotated[
        bool,
        typer.Option(
            "--correct-bias",
            help="Put into each bias what rounding moves the mean of the layer's output by, as calibration "
            "shows it.",
            rich_help_panel=_INT8,
        ),
    ] = False,
    threshold: options.Threshold = None,
    bake: options.Bake = False,
    eps: options.Eps = None,
    allow_code: options.AllowCode = None,
    allow_pickle: options.AllowPickle = False,
    seed: options.Seed = None,
    report: options.Report = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fuse a checkpoint, make it int8, and say how like the float model it is.

    Nothing is written unless it meets the spec's threshold: fusecli quantize model.pt --spec quantize.yaml
    """
    reports = Reports.parse(report or [], quiet, [checkpoint, spec, output])

    def work() -> Outcome:
        from fusecli.spec.typed import spec_from_options

        chosen: dict[str, Any] = {
            "observer": observer,
            "weights": weights,
            "equalize": equalize or None,
            "correct_bias": correct_bias or None,
        }
        typed = {name: value for name, value in chosen.items() if value is not None}
        if threshold is not None:
            typed["threshold"] = options.lines(threshold)
        # Before torch is imported: a slip in the spec is told at once.
        parsed = spec_from_options(spec, model=model, inputs=inputs or (), bake=bake, eps=eps, quantize=typed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fusecli.jobs.batches import protected
            from fusecli.jobs.quantize import QuantizeRequest, quantize_file

            reports.spare(protected(parsed))
            request = QuantizeRequest(
                checkpoint,
                parsed,
                output,
                format=fmt,
                force=force,
                dry_run=dry_run,
                allow_pickle=allow_pickle,
                seed=seed,
                typed=tuple(options.typed_words(model, inputs)),
                trusted=tuple(options.trusted(None, model)),
            )
            with dialogue(quiet) as person:
                consent = reports.consent(person, allow_code, model)
                return quantize_file(request, consent, person.tick)

    finish(Failed("quantize", checkpoint, spec), reports, work)
