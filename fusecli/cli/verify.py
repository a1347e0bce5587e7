"""`fusecli verify`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer

from fusecli.cli import options
from fusecli.cli.reports import Failed, Reports, finish
from fusecli.cli.screen import dialogue
from fusecli.outcome import Outcome


def verify(
    checkpoint: options.Checkpoint,
    fused: Annotated[Path, typer.Argument(help="The artifact that fusecli made of it.")],
    spec: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--spec", "-s", help="The spec, where the model is to be built and run."),
    ] = None,
    model: options.Model = None,
    inputs: options.Inputs = None,
    threshold: options.Threshold = None,
    allow_code: options.AllowCode = None,
    allow_pickle: options.AllowPickle = False,
    seed: options.Seed = None,
    samples: options.Samples = None,
    strict: options.Strict = False,
    assume_same_path: options.SamePath = False,
    report: options.Report = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Prove again, from the files, that an artifact computes what the checkpoint does.

    With the spec, or --model and --input, the model is run, end to end. Without, each group is judged by
    itself, by its tensors.
    """
    reports = Reports.parse(report or [], quiet, [checkpoint, fused, spec])

    def work() -> Outcome:
        from fusecli.spec.typed import spec_from_options

        known = spec is not None or model is not None
        typed = {"threshold": options.lines(threshold)} if threshold is not None else None
        parsed = (
            spec_from_options(
                spec, model=model, inputs=inputs or (), same_path=assume_same_path, quantize=typed
            )
            if known
            else None
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fusecli.jobs.batches import protected
            from fusecli.jobs.verify import VerifyRequest, verify_file

            reports.spare(protected(parsed) if parsed else [])

            request = VerifyRequest(checkpoint, fused, parsed, strict, allow_pickle, seed, samples)
            with dialogue(quiet) as person:
                consent = reports.consent(person, allow_code, model)
                return verify_file(request, consent, person.tick)

    finish(Failed("verify", checkpoint, spec), reports, work)
