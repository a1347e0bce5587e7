"""Plans at other sizes: a group that is only there at the recorded size would be proposed, and then fail."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from fusecli.engine import plan
from fusecli.errors import UsageError
from fusecli.graph.record import Run
from fusecli.jobs.fold import Fold, Refused
from fusecli.outcome import Refusal
from fusecli.proof.compare import Difference
from fusecli.proof.sizes import Axes, at_other_sizes, sizes_of
from fusecli.rewrite import ModuleTree
from fusecli.sample import Sample


def require_other_sizes(fold: Fold, run: Run, dynamic: Sequence[Axes] = ()) -> None:
    """Guard: the run, recorded again at other sizes as far as the model takes them, shows the same groups.

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
