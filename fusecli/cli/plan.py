"""`fusecli plan`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from fusecli.cli.command import Choosing, command
from fusecli.cli.reports import write_text
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.outcome import FileFacts, Outcome

if TYPE_CHECKING:
    from fusecli.commands.plan import PlanRequest
    from fusecli.consent import Consent
    from fusecli.spec import Spec


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Choosing):
    """The options of `fusecli plan`."""

    name = "plan"

    spec: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--spec", "-s", help="A spec whose model, inputs, exclude and mappings are taken over."),
    ] = None
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", "-o", help="The spec to write. Default: it is printed."),
    ] = None
    graph: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--graph", help="Also draw what stands around each norm, as SVG: fused, or left and why."
        ),
    ] = None
    around: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--graph-around", metavar="NAME", help="Draw only around this module. Repeatable."),
    ] = None
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--exclude", metavar="PATTERN", help="Leave what this pattern covers. Repeatable."),
    ] = None


@command(PlanOptions)
def plan(given: PlanOptions) -> None:
    """Write the spec that fuses everything sound, by recording one run of the model.

    fusecli plan model.pt --model net.py:Net --input 1x3x224x224 -o fuse.yaml
    """
    output, graph, around = given.output, given.graph, given.around
    reports = given.reports(output, graph)
    if output is None and reports.takes_stdout:
        raise UsageError(
            Problem("the spec goes to stdout already", "--report", "give -o, or the report a path")
        )
    if around and graph is None:
        raise UsageError(Problem("there is no picture", "--graph-around", "add --graph out.svg"))

    def work(spec: Spec, consent: Consent, progress: Callable[[str], None]) -> Outcome:
        from fusecli.commands.plan import PlanRequest, plan_file

        read = [given.checkpoint, *reports.spared]
        for path, taken in ((output, read), (graph, [*read, *filter(None, [output])])):
            if path is not None:
                _free(path, given.force, taken)
        folder = output.parent if output is not None else Path.cwd()
        drawn = tuple(around or ()) if graph is not None else None
        request = given.picked(PlanRequest, spec=spec, folder=folder, around=drawn)
        outcome, text, picture = plan_file(request, consent, progress)
        if graph is not None and picture is not None:
            from fusecli.report import as_svg

            write_text(graph, as_svg(picture))
        if output is not None:
            return _written(outcome, text, request, output, consent.words)
        reports.product.append(text)
        return outcome

    given.run(reports, work)


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
