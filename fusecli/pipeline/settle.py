"""The one loop: what nobody has asked for and turns out to be unsound is left out, until the rest holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fusecli.outcome import Refusal
from fusecli.pipeline.fold import Fold, Refused, plan_fold
from fusecli.pipeline.select import Selection

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Settled(Generic[_Made]):
    """What it came to: the selection that is left, its fold, and what was made of that; or the groups that
    cannot be fused and that somebody has asked for."""

    selection: Selection
    fold: Fold | None = None
    made: _Made | None = None
    refused: tuple[Refusal, ...] = ()


def settle(
    selection: Selection, attempt: Callable[[Selection, Fold], tuple[_Made | None, Sequence[Refusal]]]
) -> Settled[_Made]:
    """`attempt` makes something of a fold and tells which of its groups are wrong; it raises Refused for
    those of which nothing can be made. It is not asked where there is nothing to fold."""
    while True:
        try:
            fold = plan_fold(selection.source, selection.structure, selection.groups, selection.run)
            # What was trained with simulated quantization is written as the float model that it is, with its
            # scales, folds or none.
            if not fold.decisions and selection.source.trained is None:
                return Settled(selection, fold)
            made, failed = attempt(selection, fold)
        except Refused as no:
            if not selection.may_drop(no.refused):
                return Settled(selection, refused=no.refused)
            selection = selection.without(no.refused)
            continue
        if not failed or not selection.may_leave(failed):
            return Settled(selection, fold, made)
        selection = selection.without(failed)
