"""The model as it will be, run once more: does it run, and what does it still compute?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fusecli.errors import UsageError
from fusecli.graph.dataflow import Recording
from fusecli.graph.materialise import duplicate
from fusecli.graph.record import Run
from fusecli.rewrite import ModuleTree, Rewrite, apply_edits


def edited_run(run: Run, rewrites: Sequence[Rewrite]) -> Recording | None:
    """A run of the edited model on the same inputs, without the folded numbers; None if it does not run."""

    def edited(model: nn.Module) -> nn.Module:
        twin = duplicate(model)
        apply_edits(ModuleTree(twin), [edit for rewrite in rewrites for edit in rewrite.edits])
        return twin

    try:
        return Run(edited(run.structure), run.sample, lambda: edited(run.numbers()), run.fakes).recording
    except UsageError:
        return None
