"""`plan` on a file: the spec that fuses everything sound, with the reasons for what it leaves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fusecli.checkpoint import open_checkpoint
from fusecli.consent import Consent
from fusecli.engine import Group
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.graph.record import Run
from fusecli.jobs import facts
from fusecli.jobs.choice import chosen
from fusecli.jobs.entries import entries
from fusecli.jobs.fold import Refused, apply_to_skeleton, group_reports, plan_fold, try_fold
from fusecli.jobs.inputs import samples_of
from fusecli.jobs.source import folder_of, source_of
from fusecli.jobs.verdicts import recorded
from fusecli.outcome import Outcome, Unfused
from fusecli.plain import visible
from fusecli.rewrite import ModuleTree
from fusecli.spec import Spec


@dataclass(frozen=True)
class PlanRequest:
    """One call of `fusecli plan`; `spec` says how the model is built and run, its groups are not read.

    folder  where the spec that is made will stand: its paths are relative to it
    """

    checkpoint: Path
    spec: Spec
    folder: Path
    allow_pickle: bool = False
    seed: int | None = None


def plan_file(
    request: PlanRequest, consent: Consent, tick: Callable[[str], None] = lambda _: None
) -> tuple[Outcome, str]:
    """What can be fused, and the YAML that says so.

    Raises UsageError and UnsafeError where the model cannot be built or run.
    """
    spec = request.spec.model_copy(update={"groups": (), "discover": True})
    tick("opening the checkpoint")
    with open_checkpoint(
        request.checkpoint,
        allow_pickle=request.allow_pickle,
        key=spec.checkpoint.key,
        strip_prefix=spec.checkpoint.strip_prefix,
    ) as checkpoint:
        source = source_of(checkpoint, spec, consent)
        if source.build is None:
            fix = "give --model and --input, or a spec with model and inputs (--spec)"
            raise UsageError(Problem("planning runs the model, and its code is not known", "", fix))
        skeleton = source.skeleton()
        tick("recording one forward")
        seed = request.seed if request.seed is not None else spec.verify.seed
        run = Run(skeleton, samples_of(spec, seed, 1)[0], source.original)
        tree = ModuleTree(skeleton)
        modules = dict(skeleton.named_modules())
        choice = chosen(spec, tree, modules, (), run, source.vocabulary)
        while True:
            try:
                fold = plan_fold(source, skeleton, choice.groups, run)
                tick("trying the folds")
                try_fold(fold)
                break
            except Refused as no:
                choice.drop(no.refused)
        unfused = choice.unfused(fold.decisions)
        names = [path for path in tree.modules if path]
        text = _written(request, spec, choice.groups, unfused, names)
        apply_to_skeleton(fold)
        outcome = Outcome(
            "plan",
            "proposed",
            ExitCode.OK if fold.decisions else ExitCode.NOTHING,
            groups=tuple(group_reports(fold, skeleton)),
            unfused=unfused,
            input=facts.input_facts(source.checkpoint),
            environment=facts.environment(),
            recording=recorded(run),
        )
        if not fold.decisions:
            outcome = replace(
                outcome, status="nothing to fuse", problems=("the dataflow offers nothing to fold",)
            )
        return outcome, text


def _written(
    request: PlanRequest,
    spec: Spec,
    groups: Sequence[Group],
    unfused: Sequence[Unfused],
    names: Sequence[str],
) -> str:
    lines = [f"# {visible(request.checkpoint.name)}: {_counted(groups, unfused)}", "version: 1"]
    return "\n".join([*lines, *_base(request, spec), listing(groups, unfused, names)])


def listing(groups: Sequence[Group], unfused: Iterable[Unfused], names: Sequence[str]) -> str:
    """The groups as a spec lists them, and every norm that is left, as comments."""
    listed = [line for entry in entries([g.modules for g in groups], names) for line in entry]
    lines = ["groups:", *listed] if listed else ["groups: []"]
    return "\n".join([*lines, *_comments(unfused)]) + "\n"


def _counted(groups: Sequence[Group], unfused: Sequence[Unfused]) -> str:
    left = f"{len(unfused)} norm{'s' if len(unfused) != 1 else ''} left"
    return f"{len(groups)} group{'s' if len(groups) != 1 else ''}, {left}"


def _base(request: PlanRequest, spec: Spec) -> Iterator[str]:
    """The parts of the spec that are taken over."""
    taken: dict[str, Any] = spec.model_dump(
        mode="json",
        by_alias=True,
        exclude_defaults=True,
        include={"checkpoint", "model", "inputs", "exclude", "extra_mappings", "verify", "output"},
    )
    here = folder_of(request.spec)
    for owner, key in _paths(taken):
        file, colon, name = owner[key].rpartition(":") if key != "file" else (owner[key], "", "")
        if key == "file" or file.endswith(".py"):
            owner[key] = os.path.relpath(here / file, request.folder) + colon + name
    for key, value in taken.items():
        rows = value if isinstance(value, list) else None
        if rows is None:
            yield f"{key}: {_flow(value)}"
        else:
            yield f"{key}:"
            yield from (f"  - {_flow(row)}" for row in rows)


def _paths(taken: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a path may stand that is relative to the spec."""
    if "model" in taken:
        yield taken["model"], "factory"
    yield from ((extra, "fuser") for extra in taken.get("extra_mappings", ()) if extra.get("fuser"))
    waiting = list(taken.get("inputs", ()))
    for entry in waiting:
        if isinstance(entry, list):
            waiting += entry
        elif entry.get("file"):
            yield entry, "file"


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _comments(unfused: Iterable[Unfused]) -> Iterator[str]:
    """Every norm that is left, by reason; names are data and stay on their line."""
    reasons: dict[tuple[str, str], list[Unfused]] = {}
    for norm in unfused:
        reasons.setdefault((norm.code, norm.reason), []).append(norm)
    if reasons:
        yield "# Left, with the reason ('fusecli explain CODE' says more):"
    for (code, reason), left in reasons.items():
        yield f"#   {code}: {visible(reason)}"
        for norm in left:
            yield f"#     {visible(norm.module)} ({visible(norm.kind)})"
