"""The model as it will be, run once more: does it run, and what does it still compute?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fusecli.errors import UsageError
from fusecli.graph.dataflow import Recording
from fusecli.graph.record import Run
from fusecli.rewrite import ModuleTree, Rewrite, apply_edits


def edited_run(run: Run, rewrites: Sequence[Rewrite]) -> Recording | None:
    """A run of the edited model on the same inputs, without the folded numbers; None if it does not run."""

    def edited(model: nn.Module) -> nn.Module:
        apply_edits(ModuleTree(model), [edit for rewrite in rewrites for edit in rewrite.edits])
        return model

    structure = edited(run.numbers())
    try:
        return Run(structure, run.sample, lambda: structure).recording
    except UsageError:
        return None
