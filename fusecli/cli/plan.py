"""`fusecli plan`."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fusecli.cli import options
from fusecli.cli.reports import Failed, Reports, finish, write_text
from fusecli.cli.screen import dialogue
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.outcome import FileFacts, Outcome

if TYPE_CHECKING:
    from fusecli.jobs.plan import PlanRequest


def plan(
    checkpoint: options.Checkpoint,
    model: options.Model = None,
    inputs: options.Inputs = None,
    spec: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--spec", "-s", help="A spec whose model, inputs, exclude and mappings are taken over."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The spec to write. Default: it is printed."),
    ] = None,
    graph: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--graph", help="Also draw what stands around each norm, as SVG: fused, or left and why."
        ),
    ] = None,
    around: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--graph-around", metavar="NAME", help="Draw only around this module. Repeatable."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
    target: options.Target = None,
    shared: options.Shared = None,
    bake: options.Bake = False,
    rules: options.Rules = None,
    no_rules: options.NoRules = None,
    allow_restructure: options.Restructure = False,
    remove_idle: options.RemoveIdle = False,
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--exclude", metavar="PATTERN", help="Leave what this pattern covers. Repeatable."),
    ] = None,
    allow_code: options.AllowCode = None,
    allow_pickle: options.AllowPickle = False,
    seed: options.Seed = None,
    assume_same_path: options.SamePath = False,
    report: options.Report = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write the spec that fuses everything sound, by recording one run of the model.

    fusecli plan model.pt --model net.py:Net --input 1x3x224x224 -o fuse.yaml
    """
    reports = Reports.parse(report or [], quiet, [checkpoint, spec, output, graph])

    if output is None and reports.takes_stdout:
        raise UsageError(
            Problem("the spec goes to stdout already", "--report", "give -o, or the report a path")
        )
    if around and graph is None:
        raise UsageError(Problem("there is no picture", "--graph-around", "add --graph out.svg"))

    def work() -> Outcome:
        from fusecli.spec.typed import spec_from_options

        parsed = spec_from_options(
            spec,
            model=model,
            inputs=inputs or (),
            target=target,
            exclude=exclude or (),
            shared=shared,
            bake=bake,
            rules=rules,
            no_rules=no_rules,
            allow_restructure=allow_restructure,
            remove_idle=remove_idle,
            same_path=assume_same_path,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fusecli.jobs.fuse import protected
            from fusecli.jobs.plan import PlanRequest, plan_file

            reports.spare(protected(parsed))
            read = [checkpoint, *protected(parsed)]
            for path, taken in ((output, read), (graph, [*read, *filter(None, [output])])):
                if path is not None:
                    _free(path, force, taken)
            folder = output.parent if output is not None else Path.cwd()
            drawn = tuple(around or ()) if graph is not None else None
            request = PlanRequest(checkpoint, parsed, folder, allow_pickle, seed, drawn)
            with dialogue(quiet) as person:
                consent = reports.consent(person, allow_code, model)
                outcome, text, picture = plan_file(request, consent, person.tick)
        if graph is not None and picture is not None:
            from fusecli.report import as_svg

            write_text(graph, as_svg(picture))
        if output is not None:
            return _written(outcome, text, request, output, consent.words)
        reports.product.append(text)
        return outcome

    finish(Failed("plan", checkpoint, spec), reports, work)


def _free(output: Path, force: bool, read: Sequence[Path]) -> None:
    """Raises UsageError for a path that cannot be written: after the work it would be lost."""
    if any(output.resolve() == path.resolve() for path in read):
        raise UsageError(Problem("is a file of the command itself", str(output), "choose another path"))
    if output.is_dir():
        raise UsageError(Problem("is a folder", str(output), "give a file name inside it"))
    if output.exists() and not force:
        raise UsageError(Problem("exists already", str(output), "add --force, or choose another path"))
    if not output.parent.is_dir():
        raise UsageError(Problem("its folder does not exist", str(output), "create it first"))


def _written(
    outcome: Outcome, text: str, request: PlanRequest, output: Path, allowed: Sequence[str]
) -> Outcome:
    write_text(output, text)
    words = ["fusecli", "fuse", str(request.checkpoint), "--spec", str(output)]
    # A spec does not get to run the code that it names, typed or not.
    words += [word for name in dict.fromkeys(allowed) for word in ("--allow-code", name)]
    words += ["--allow-pickle"] if request.allow_pickle else []
    command = shlex.join(words)
    return replace(
        outcome,
        output=FileFacts(str(output), "YAML", len(text.encode())),
        next_step=command if outcome.exit_code is ExitCode.OK else "",
    )
