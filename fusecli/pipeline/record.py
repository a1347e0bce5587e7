"""One forward of a source: as it is, as a fold would make it, and at other sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from fusecli.bisect import failing
from fusecli.engine import plan
from fusecli.errors import UsageError
from fusecli.graph.dataflow import Recording
from fusecli.graph.kinds import is_exact
from fusecli.graph.record import Run
from fusecli.outcome import Refusal
from fusecli.pipeline.fold import Fold, Refused
from fusecli.proof.compare import Difference
from fusecli.proof.sizes import Axes, at_other_sizes, sizes_of
from fusecli.rewrite import Bias, Identity, ModuleTree, Rewrite, apply_edits
from fusecli.sample import Sample
from fusecli.source.source import Source, Structure

_GONE = "forward does not run with it fused: it asks the modules for something that is then gone"


def record(
    source: Source, structure: Structure, sample: Sample, others: Callable[[], Sequence[Sample]] = tuple
) -> Run:
    """A run on `sample`, made when somebody looks at it; `others` are the further samples of the proof."""
    return Run(structure.model, sample, lambda: source.runnable(structure), others)


def seen(run: Run | None) -> Recording | None:
    """What a run has shown; None where there is none, or the model does not run."""
    try:
        return run.recording if run is not None else None
    except UsageError:
        return None


def record_edited(run: Run, rewrites: Sequence[Rewrite]) -> Recording | None:
    """A run of the edited model on the same inputs, without the folded numbers; None if it does not run."""
    model = run.numbers()
    apply_edits(ModuleTree(model), [edit for rewrite in rewrites for edit in rewrite.edits])
    return seen(Run(model, run.sample, lambda: model))


def ops_after(fold: Fold, run: Run | None) -> int | None:
    """How many ops the folded model computes; None where that is not known before it is written."""
    recording = seen(run)
    if run is None or recording is None or any(decision.custom for decision in fold.decisions):
        return None
    taken = _taken_out(fold, recording)
    if taken is not None:
        return recording.steps - recording.steps_in(taken)
    after = record_edited(run, fold.rewrites)
    return after.steps if after is not None else None


def _taken_out(fold: Fold, recording: Recording) -> set[int] | None:
    """The op calls that are gone, where the fold takes modules out and gives layers of torch a bias; None
    where it does more, so that only a run tells."""
    tree, taken = fold.structure.tree, set[int]()
    for edit in fold.edits:
        visits = recording.visits_of(edit.path) if isinstance(edit, Identity) else []
        if not (isinstance(edit, Identity) and all(visit.plain for visit in visits)) and not (
            isinstance(edit, Bias) and is_exact(tree[edit.path])
        ):
            return None
        taken.update(number for visit in visits for number in visit.calls)
    return taken


def require_running(fold: Fold, run: Run) -> None:
    """Guard: the edited model runs. Raises Refused with the groups for which it does not."""
    if any(decision.custom for decision in fold.decisions):
        return
    pairs = list(zip(fold.decisions, fold.rewrites, strict=True))
    broken = failing(pairs, lambda part: record_edited(run, [rewrite for _, rewrite in part]) is not None)
    if refused := [Refusal(d.group.modules, "dropped", _GONE, d.rule) for d, _ in broken]:
        raise Refused(refused)


def require_other_sizes(fold: Fold, run: Run, dynamic: Sequence[Axes] = ()) -> None:
    """Guard: a group that is only there at the recorded size would be proposed, and then fail. The run,
    recorded again at other sizes as far as the model takes them, shows the same groups.

    Raises Refused with those that it does not show.
    """
    source = fold.source
    # A layer that is only made plain is the same at every size, and no plan of its own.
    plain = {(path,) for path in source.bakes}
    groups = [decision.group for decision in fold.decisions if decision.group.modules not in plain]
    refused: list[Refusal] = []

    def differs(sample: Sample) -> Difference | None:
        other = Run(run.structure, sample, run.numbers)
        try:
            found = plan(ModuleTree(run.structure), groups, source.vocabulary, other)
        except UsageError:  # it does not run so
            return None
        for no in found.refused:
            reason = f"it holds at {sizes_of(run.sample)}, but not at {sizes_of(sample)}: {no.reason}"
            refused.append(Refusal(no.group, "dropped", reason, no.rule, no.evidence))
        return Difference(inf) if refused else Difference()

    if groups:
        at_other_sizes(run.sample, dynamic, differs)
    if refused:
        raise Refused(refused)
