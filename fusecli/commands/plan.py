"""`plan` on a file: the spec that fuses everything sound, with the reasons for what it leaves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fusecli.artifact import manifest_of
from fusecli.checkpoint import Checkpoint, open_checkpoint
from fusecli.commands.entries import entries
from fusecli.commands.picture import check_around, picture_of
from fusecli.consent import Consent
from fusecli.engine import Group
from fusecli.errors import ExitCode, Problem, RefusedError, UsageError
from fusecli.outcome import LedgerEntry, Outcome, Refusal, Unfused
from fusecli.picture import Picture
from fusecli.pipeline import facts
from fusecli.pipeline.fold import Fold, Progress, edited_structure, folded, range_of
from fusecli.pipeline.outcome import group_reports, recorded
from fusecli.pipeline.prove import trials_of
from fusecli.pipeline.record import require_other_sizes, require_running, seen
from fusecli.pipeline.select import Selection, record_and_select
from fusecli.pipeline.settle import settle
from fusecli.pipeline.weight_ranges import Ranges
from fusecli.plain import visible
from fusecli.proof.sizes import Axes
from fusecli.rewrite import MANIFEST_KEY
from fusecli.source.resolve import source_of
from fusecli.source.samples import as_computed
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
    request: PlanRequest, consent: Consent, progress: Progress = lambda _: None
) -> tuple[Outcome, str, Picture | None]:
    """What can be fused, the YAML that says so, and a picture of it where one is wanted.

    Raises UsageError and UnsafeError where the model cannot be built or run.
    """
    spec = request.spec.model_copy(update={"groups": (), "discover": True})
    progress("opening the checkpoint")
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
        progress("recording one forward")
        typed, told = as_computed(spec, checkpoint)
        trials = trials_of(source, typed, request.seed)
        structure = source.structure()
        selection = record_and_select(
            spec, source, structure, trials.samples[0], (), lambda: trials.samples[1:]
        )
        names = selection.structure.names
        bind_groups(spec, names)  # there are none; an exclude that matches nothing is a slip
        check_around(request.around or (), names)
        progress("trying the folds")
        found = proposed(selection, trials.dynamic)
        outcome = _outcome(found, told)
        lines = [f"# {visible(request.checkpoint.name)}: {_counted(found)}", "version: 1"]
        text = "\n".join([*lines, *_base(request, spec), found.text])
        picture = None
        if request.around is not None:
            picture = picture_of(
                request.checkpoint.name, found.selection, found.fold.decisions, found.unfused, request.around
            )
        return outcome, text, picture


@dataclass(frozen=True)
class Proposed:
    """What can be fused: the groups, their fold, and what that does to the ranges of weights."""

    selection: Selection
    fold: Fold
    ranges: Mapping[int, Ranges]

    @property
    def unfused(self) -> tuple[Unfused, ...]:
        return self.selection.unfused(self.fold.decisions)

    @property
    def caveats(self) -> list[LedgerEntry]:
        return facts.caveat_ledger(self.fold.decisions, seen(self.selection.run))

    @property
    def text(self) -> str:
        """The groups as a spec lists them, and as comments what is left and what the run could not show."""
        selection = self.selection
        listed = listing(selection.groups, self.unfused, selection.structure.names, selection.idle)
        return listed + remarks(self.caveats)


def proposed(selection: Selection, dynamic: Sequence[Axes] = ()) -> Proposed:
    """The groups of the selection that can be folded, at other sizes too, and with which the model runs.

    Raises RefusedError where an adapter cannot be added.
    """
    run = selection.run
    assert run is not None

    def attempt(_: Selection, fold: Fold) -> tuple[dict[int, Ranges], Sequence[Refusal]]:
        ranges = {number: range_of(fold, number, rewrite) for number, rewrite in folded(fold)}
        require_other_sizes(fold, run, dynamic)
        require_running(fold, run)
        return ranges, ()

    settled = settle(selection, attempt)
    if settled.fold is None:
        raise RefusedError(*(Problem(no.reason, " + ".join(no.group), no.remedy) for no in settled.refused))
    return Proposed(settled.selection, settled.fold, settled.made or {})


def _outcome(found: Proposed, told: Iterable[LedgerEntry]) -> Outcome:
    selection, fold = found.selection, found.fold
    outcome = Outcome(
        "plan",
        "proposed",
        ExitCode.OK,
        groups=tuple(group_reports(fold, edited_structure(fold)[0], found.ranges)),
        unfused=found.unfused,
        input=facts.input_facts(selection.source.checkpoint),
        environment=facts.environment(),
        recording=recorded(selection),
        ledger=(*told, *facts.path_ledger(fold.decisions), *found.caveats),
    )
    if fold.decisions:
        return outcome
    problems = ("the dataflow offers nothing to fold",)
    return replace(outcome, status="nothing to fuse", exit_code=ExitCode.NOTHING, problems=problems)


def _require_original(checkpoint: Checkpoint) -> None:
    if MANIFEST_KEY in checkpoint.metadata and manifest_of(checkpoint).mode == "folded":
        groups = len(manifest_of(checkpoint).groups)
        what = f"is an artifact of fusecli: its {groups} groups are folded already"
        raise UsageError(Problem(what, str(checkpoint.path), "plan on the original checkpoint"))


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


def _counted(found: Proposed) -> str:
    groups, left = len(found.selection.groups), len(found.unfused)
    return f"{groups} group{'s' if groups != 1 else ''}, {left} norm{'s' if left != 1 else ''} left"


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
