"""The float64 twins at other sizes than the recorded ones: end to end, inside, and what each group gives.

They are the twins that have run on the samples, and it is the last that they are used for: a model may keep
something for each size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fusecli.equivalence.compare import MOST, Difference, Incomparable, compare, floating_error
from fusecli.equivalence.culprit import culprit
from fusecli.equivalence.noise import tolerance
from fusecli.equivalence.run import run
from fusecli.equivalence.sizes import Axes, at_other_sizes, sizes_of
from fusecli.equivalence.trail import Trail, followed
from fusecli.equivalence.trial import Trial
from fusecli.graph.places import place
from fusecli.outcome import LedgerEntry
from fusecli.sample import Sample

_NONE = Difference()


def judge_elsewhere(trial: Trial, dynamic: Sequence[Axes], way: Sequence[str]) -> None:
    """What the twins do at other sizes goes to the trial's findings; `way` is how the original went.

    Nothing is asked of models that differ already, or that are no function of their input.
    """
    found = trial.found
    if found.erratic or found.whole_differs or any(c.differs for c in found.checks):
        return
    elsewhere = _Elsewhere(trial, list(way))
    found.sizes = at_other_sizes(trial.sample, dynamic, elsewhere.differs)
    found.ledger += elsewhere.ledger
    if found.sizes.wrong is not None:
        elsewhere.blame(*found.sizes.wrong)


@dataclass
class _Elsewhere:
    trial: Trial
    way: list[str]
    ledger: list[LedgerEntry] = field(default_factory=list)

    def differs(self, sample: Sample) -> Difference | None:
        trial = self.trial
        try:
            trail, reference = self._followed(trial.original, sample)
        except Exception:  # whatever somebody's forward may raise: it takes no such input
            return None
        self._note_way(trail, sample)
        try:
            found = self._between(trail, reference, *self._followed(trial.fused, sample))
        except Incomparable:
            return None
        except Exception as error:
            said = f"the fused model raises {type(error).__name__}: {error}"
            return Difference(math.inf, "output", said)
        if found.undefined:
            return None
        return found if found.error > self._tolerance(found.error, reference, sample) else _NONE

    def blame(self, name: str, sample: Sample, difference: Difference) -> None:
        """Names the group whose fold holds for the recorded size only; without one it is the whole."""
        found, partly_fused = self.trial.found, self.trial.subject.partly_fused
        error = difference.why or f"relative error {difference.error:.1e} in float64"
        said = f"right at {sizes_of(self.trial.sample)}, but at {name} the fused model differs: {error}"
        number = self._culprit(partly_fused, sample) if partly_fused is not None else None
        if number is None:
            found.end = Difference(difference.error, difference.where, said)
        else:
            fixed = "if sizes never change, say `dynamic: []` for the inputs in the spec"
            found.checks[number].trouble = f"{said}; {fixed}"

    def _culprit(self, partly_fused: Callable[[int], nn.Module], sample: Sample) -> int | None:
        trail, reference = self._followed(partly_fused(0), sample)

        def differs(count: int) -> bool:
            try:
                found = self._between(trail, reference, *self._followed(partly_fused(count), sample))
            except Exception:  # a model that half a fold breaks
                return True
            if found.undefined:  # of the original: no fold has done that
                return False
            return found.error > self._tolerance(found.error, reference, sample)

        return culprit(len(self.trial.found.checks), differs)

    def _followed(self, model: nn.Module, sample: Sample) -> tuple[Trail, Any]:
        subject = self.trial.subject
        with followed(model, subject.spans, subject.exits) as trail:
            output = run(model, sample, seed=self.trial.seed, dtype=torch.float64)
        return trail, output

    def _between(self, mine: Trail, reference: Any, theirs: Trail, output: Any) -> Difference:
        inside = mine.against(theirs).worse(mine.exits_against(theirs))
        return compare(reference, output).worse(inside)

    def _tolerance(self, error: float, reference: Any, sample: Sample) -> float:
        """The line for an error here; what the noise is at this size is asked where it decides."""
        found = self.trial.found
        if not found.tolerance < error <= MOST:
            return found.tolerance
        try:
            noise = floating_error(reference, run(self.trial.subject.original, sample, seed=self.trial.seed))
        except Exception:  # it runs in float64 only
            return found.tolerance
        return max(found.tolerance, tolerance(noise, found.dtype))

    def _note_way(self, trail: Trail, sample: Sample) -> None:
        """That forward does other things at other sizes: then it has asked for one."""
        if self.ledger or trail.way == self.way:
            return
        pairs = enumerate(zip(trail.way, self.way, strict=False))
        other = next((n for n, (a, b) in pairs if a != b), min(len(trail.way), len(self.way)))
        with _Placing(other) as placing:
            try:
                run(self.trial.original, sample, seed=self.trial.seed, dtype=torch.float64)
            except Exception:  # what it keeps of its sizes may not fit any more
                return
        here, there = sizes_of(self.trial.sample), sizes_of(sample)
        what = (
            f"forward goes another way at {there} than at {here}: it decides by sizes, and the verdict "
            "speaks for those that were run"
        )
        self.ledger.append(LedgerEntry("sizes", placing.place or "the model's forward", what))


class _Placing(TorchFunctionMode):
    """Notes where operation number `wanted` of a run is called, or the last one if there are fewer."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self._left = wanted
        self.place = ""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor | tuple | list):
            if self._left >= 0:
                self.place = place() or self.place
            self._left -= 1
        return result
