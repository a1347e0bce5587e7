"""`plan` on a file: the spec that fuses everything sound, with the reasons for what it leaves."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fusecli.artifact import manifest_of
from fusecli.checkpoint import Checkpoint, open_checkpoint
from fusecli.consent import Consent
from fusecli.engine import Group
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.graph.record import Run
from fusecli.jobs import facts
from fusecli.jobs.choice import looked, settled
from fusecli.jobs.entries import entries
from fusecli.jobs.fold import Fold, Refused, apply_to_skeleton, group_reports, try_fold
from fusecli.jobs.inputs import as_computed, dynamic_axes, samples_of
from fusecli.jobs.picture import check_around, picture_of
from fusecli.jobs.rerun import edited_run
from fusecli.jobs.sizes import require_other_sizes
from fusecli.jobs.source import source_of
from fusecli.jobs.verdicts import recorded
from fusecli.outcome import LedgerEntry, Outcome, Refusal, Unfused
from fusecli.picture import Picture
from fusecli.plain import visible
from fusecli.proof.sizes import Axes
from fusecli.rewrite import MANIFEST_KEY, ModuleTree
from fusecli.spec import Spec
from fusecli.spec.inputs import is_mapping
from fusecli.spec.wildcards import bind_groups

_NUMBERLIKE = re.compile(r"[-+]?\.?\d")


@dataclass(frozen=True)
class PlanRequest:
    """One call of `fusecli plan`; `spec` says how the model is built and run, its groups are not read.

    folder  where the spec that is made will stand: its paths are relative to it
    around  the modules that a picture is drawn around; empty: every norm. None: there is no picture
    """

    checkpoint: Path
    spec: Spec
    folder: Path
    allow_pickle: bool = False
    seed: int | None = None
    around: tuple[str, ...] | None = None


def plan_file(
    request: PlanRequest, consent: Consent, tick: Callable[[str], None] = lambda _: None
) -> tuple[Outcome, str, Picture | None]:
    """What can be fused, the YAML that says so, and a picture of it where one is wanted.

    Raises UsageError and UnsafeError where the model cannot be built or run.
    """
    spec = request.spec.model_copy(update={"groups": (), "discover": True})
    tick("opening the checkpoint")
    with open_checkpoint(
        request.checkpoint,
        allow_pickle=request.allow_pickle,
        key=spec.checkpoint.key,
        strip_prefix=spec.checkpoint.strip_prefix,
        consent=consent,
    ) as checkpoint:
        _require_original(checkpoint)
        source = source_of(checkpoint, spec, consent)
        if source.build is None:
            fix = "give --model and --input, or a spec with model and inputs (--spec)"
            raise UsageError(Problem("planning runs the model, and its code is not known", "", fix))
        tick("recording one forward")
        seed = request.seed if request.seed is not None else spec.verify.seed
        typed, told = as_computed(spec, checkpoint)
        sample = samples_of(typed, seed, 1)[0]
        skeleton, run, choice = looked(
            spec,
            source,
            source.skeleton,
            source.runnable,
            sample,
            (),
            others=lambda: samples_of(typed, seed, spec.verify.samples)[1:],
        )
        names = [path for path in ModuleTree(skeleton).modules if path]
        bind_groups(spec, names)  # there are none; an exclude that matches nothing is a slip
        check_around(request.around or (), names)
        tick("trying the folds")
        dynamic = dynamic_axes(typed, sample)
        fold, _ = settled(source, skeleton, choice, run, lambda fold: _try(fold, run, dynamic))
        unfused = choice.unfused(fold.decisions)
        ledger = facts.caveat_ledger(fold.decisions, run.recording)
        text = _written(request, spec, choice.groups, unfused, names, choice.idle) + remarks(ledger)
        picture = None
        if request.around is not None:
            picture = picture_of(
                request.checkpoint.name, run.recording, choice, fold.decisions, unfused, request.around
            )
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
            ledger=(*told, *facts.path_ledger(fold.decisions), *ledger),
        )
        if not fold.decisions:
            outcome = replace(
                outcome, status="nothing to fuse", problems=("the dataflow offers nothing to fold",)
            )
        return outcome, text, picture


def _require_original(checkpoint: Checkpoint) -> None:
    if MANIFEST_KEY in checkpoint.metadata and manifest_of(checkpoint).mode == "folded":
        groups = len(manifest_of(checkpoint).groups)
        what = f"is an artifact of fusecli: its {groups} groups are folded already"
        raise UsageError(Problem(what, str(checkpoint.path), "plan on the original checkpoint"))


def _try(fold: Fold, run: Run, dynamic: Sequence[Axes]) -> None:
    """Folds and forgets, looks at other sizes, and runs the edited model; raises Refused with the groups that
    do not allow it."""
    try_fold(fold)
    require_other_sizes(fold, run, dynamic)
    if any(decision.custom for decision in fold.decisions) or edited_run(run, fold.rewrites):
        return
    found = zip(fold.decisions, fold.rewrites, strict=True)
    broken = [decision for decision, rewrite in found if edited_run(run, [rewrite]) is None]
    reason = "forward does not run with it fused: it asks the modules for something that is then gone"
    if broken:
        raise Refused([Refusal(d.group.modules, "dropped", reason, d.rule) for d in broken])


def _written(
    request: PlanRequest,
    spec: Spec,
    groups: Sequence[Group],
    unfused: Sequence[Unfused],
    names: Sequence[str],
    idle: Sequence[str],
) -> str:
    lines = [f"# {visible(request.checkpoint.name)}: {_counted(groups, unfused)}", "version: 1"]
    return "\n".join([*lines, *_base(request, spec), listing(groups, unfused, names, idle)])


def listing(
    groups: Sequence[Group], unfused: Iterable[Unfused], names: Sequence[str], idle: Sequence[str] = ()
) -> str:
    """The groups as a spec lists them, and as comments every norm that is left and what does nothing."""
    listed = [line for entry in entries([g.modules for g in groups], names) for line in entry]
    lines = ["groups:", *listed] if listed else ["groups: []"]
    if idle:
        lines.append("# Does nothing at inference (--remove-idle makes identities of it):")
        lines += [f"#   {visible(path)}" for path in idle]
    return "\n".join([*lines, *_comments(unfused)]) + "\n"


def remarks(ledger: Iterable[LedgerEntry]) -> str:
    """As comments what the recorded run could not show, such as where forward decides by numbers."""
    lines = [f"#   {visible(entry.where)}: {visible(entry.what)}" for entry in ledger]
    return "\n".join(["# Not shown by the run:", *lines, ""]) if lines else ""


def _counted(groups: Sequence[Group], unfused: Sequence[Unfused]) -> str:
    left = f"{len(unfused)} norm{'s' if len(unfused) != 1 else ''} left"
    return f"{len(groups)} group{'s' if len(groups) != 1 else ''}, {left}"


def _base(request: PlanRequest, spec: Spec) -> Iterator[str]:
    """The parts of the spec that are taken over."""
    taken: dict[str, Any] = spec.model_dump(
        mode="json",
        by_alias=True,
        exclude_defaults=True,
        include={
            "checkpoint",
            "model",
            "inputs",
            "bake",
            "adapter",
            "rules",
            "no_rules",
            "allow_restructure",
            "remove_idle",
            "shared",
            "target",
            "exclude",
            "extra_mappings",
            "verify",
            "output",
        },
    )
    here = request.spec.folder
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


def _paths(taken: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where a path may stand that is relative to the spec."""
    if "model" in taken:
        yield taken["model"], "factory"
    for extra in taken.get("extra_mappings", ()):
        yield from ((extra, key) for key in ("fuser", "treat", "as") if extra.get(key))
        yield from ((extra["sequence"], number) for number in range(len(extra.get("sequence") or ())))
    if "adapter" in taken:
        yield taken["adapter"], "file"
    waiting = list(taken.get("inputs", ()))
    for entry in waiting:
        if isinstance(entry, list) or is_mapping(entry):
            waiting += entry if isinstance(entry, list) else entry.values()
        elif entry.get("file"):
            yield entry, "file"


class _Dumper(yaml.SafeDumper):
    """Text that begins as a number does is in quotes: YAML versions differ on 1e5 and 0o14."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = "'" if _NUMBERLIKE.match(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _flow(value: Any) -> str:
    flow: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "width": 10_000}
    text: str = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, **flow)
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
