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
        Optional[Path],  # noqa: UP045
        typer.Option("--spec", "-s", help="The YAML spec: which modules to fuse, and how to run it."),
    ] = None,
    discover: Annotated[
        bool,
        typer.Option(
            "--discover", help="Fuse what a run of the model shows to be sound, besides the spec's groups."
        ),
    ] = False,
    model: options.Model = None,
    inputs: options.Inputs = None,
    target: options.Target = None,
    shared: options.Shared = None,
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
    keep_going: Annotated[
        bool,
        typer.Option("--keep-going", help="Leave out groups that fail verification, write the rest, exit 1."),
    ] = False,
    require_all: Annotated[
        bool, typer.Option("--require-all", help="Fail (exit 4) if a norm is left that could be folded.")
    ] = False,
    min_folded: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--min-folded",
            metavar="PERCENT",
            min=0,
            max=100,
            help="Fail (exit 4) if less of the norms with running statistics is folded.",
        ),
    ] = None,
    qat: options.Qat = None,
    eps: options.Eps = None,
    bake: options.Bake = False,
    rules: options.Rules = None,
    no_rules: options.NoRules = None,
    allow_restructure: options.Restructure = False,
    remove_idle: options.RemoveIdle = False,
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
    """Fuse a checkpoint, prove that it computes the same, and write it.

    Nothing is written unless the proof succeeds: fusecli fuse model.pt --spec fuse.yaml, or without a spec:
    fusecli fuse model.pt --discover --model net.py:Net --input 1x3x224x224
    """
    reports = Reports.parse(report or [], quiet, [checkpoint, spec, output])

    def work() -> Outcome:
        from fusecli.spec.typed import spec_from_options

        # Before torch is imported: a slip in the spec is told at once.
        parsed = spec_from_options(
            spec,
            model=model,
            inputs=inputs or (),
            discover=discover,
            target=target,
            shared=shared,
            bake=bake,
            rules=rules,
            no_rules=no_rules,
            allow_restructure=allow_restructure,
            remove_idle=remove_idle,
            same_path=assume_same_path,
            qat=qat,
            eps=eps,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fusecli.jobs.fuse import FuseRequest, fuse_file, protected

            reports.spare(protected(parsed))

            request = FuseRequest(
                checkpoint,
                parsed,
                output,
                format=fmt,
                force=force,
                dry_run=dry_run,
                strict=strict,
                allow_pickle=allow_pickle,
                seed=seed,
                samples=samples,
                keep_going=keep_going,
                require_all=require_all,
                min_folded=min_folded,
                typed=tuple(options.typed_words(model, inputs, same_path=assume_same_path)),
                trusted=tuple(options.trusted(None, model)),
            )
            with dialogue(quiet) as person:
                consent = reports.consent(person, allow_code, model)
                return fuse_file(request, consent, person.tick)

    finish(Failed("fuse", checkpoint, spec), reports, work)
