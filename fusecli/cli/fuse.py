"""`fusecli fuse`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from fusecli.cli import options
from fusecli.cli.reports import Failed, Reports, finish
from fusecli.cli.screen import dialogue
from fusecli.outcome import Outcome


def fuse(
    checkpoint: options.Checkpoint,
    spec: Annotated[
        Path, typer.Option("--spec", "-s", help="The YAML spec: which modules to fuse, and how to run it.")
    ],
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--output", "-o", help="The file to write. Default: <stem>.fused.safetensors beside the input."
        ),
    ] = None,
    fmt: Annotated[
        Optional[Literal["safetensors", "pt"]],  # noqa: UP045
        typer.Option(
            "--format", help="The format to write. Default: what the output's name says, else safetensors."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything, exit the same way, but leave no file.")
    ] = False,
    allow_code: options.AllowCode = None,
    allow_pickle: options.AllowPickle = False,
    seed: options.Seed = None,
    samples: options.Samples = None,
    strict: options.Strict = False,
    report: options.Report = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Fuse a checkpoint, prove that it computes the same, and write it.

    Nothing is written unless the proof succeeds: fusecli fuse model.pt --spec fuse.yaml
    """
    reports = Reports.parse(report or [], quiet, [checkpoint, spec, output])

    def work() -> Outcome:
        from fusecli.spec import read_spec

        parsed = read_spec(spec)  # before torch is imported: a slip in the spec is told at once
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fusecli.consent import Consent
            from fusecli.jobs.fuse import FuseRequest, fuse_file, protected

            reports.spare(protected(parsed))

            request = FuseRequest(
                checkpoint, parsed, output, fmt, force, dry_run, strict, allow_pickle, seed, samples
            )
            with dialogue(quiet) as person:
                return fuse_file(request, Consent.gather(allow_code or [], person.asker), person.tick)

    finish(Failed("fuse", checkpoint, spec), reports, work)
