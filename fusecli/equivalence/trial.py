"""One sample through the float64 twins: group by group, inside, and end to end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fusecli.blame import forward_failed
from fusecli.equivalence.compare import MOST, TOLERANCE, Difference, Incomparable, compare
from fusecli.equivalence.culprit import culprit
from fusecli.equivalence.findings import Findings
from fusecli.equivalence.groups import observed
from fusecli.equivalence.run import changed_buffers, run
from fusecli.equivalence.subject import Subject
from fusecli.equivalence.trail import Trail, followed
from fusecli.errors import UsageError
from fusecli.sample import Sample, cast, seeded

_OTHER_SEED = 1_000_003
_INNER_READER = (
    "right by itself, but the model differs with it fused: something else reads a tensor inside it"
)
_OUT_OF_SIGHT = (
    "right in float64, but as users run the model, without hooks and modes, it differs: torch takes a fast "
    "path there that reads what the fold changes"
)


class NoTwin(Exception):
    """The model runs, but not in float64."""


@dataclass(frozen=True)
class Trial:
    """The float64 twins of original and fused model on one sample; what is seen goes to `found`."""

    subject: Subject
    original: nn.Module
    fused: nn.Module
    sample: Sample
    seed: int
    found: Findings

    def semantic(self, *, first: bool) -> Any:
        """Group by group while the original runs, then end to end; returns the original's output.

        Both run the first sample twice: to see whether the original agrees with itself, and to be followed.
        """
        before = {name: buffer.clone() for name, buffer in self.original.named_buffers()}
        reference = self._observed()
        trail = self._again(reference, before) if first else None
        found = self.found
        try:
            output = run(self.fused, self.sample, seed=self.seed, dtype=torch.float64)
            if trail:
                found.way = trail.way
                found.inside = trail.against(self._followed(self.fused)[0])
        except Exception as error:  # whatever somebody's forward may raise
            found.end = Difference(
                math.inf, "output", f"the fused model raises {type(error).__name__}: {error}"
            )
            return reference
        found.end = found.end.worse(compare(reference, output, channels=True))
        return reference

    def _followed(self, model: nn.Module) -> tuple[Trail, Any]:
        """The trail of a run with other random numbers than the first, and its output."""
        with followed(model, self.subject.spans) as trail:
            output = run(model, self.sample, seed=self.seed + _OTHER_SEED, dtype=torch.float64)
        return trail, output

    def _observed(self) -> Any:
        found = self.found

        def tell(number: int, turn: int, inputs: Any, output: Any) -> None:
            check = found.checks[number]
            check.semantic(turn, inputs, output)
            if check.order is None:
                check.order = sum(other.order is not None for other in found.checks)

        try:
            with observed(
                self.original, self.subject.groups, self.subject.passes, tell, self.subject.shapes
            ) as trouble:
                reference = run(self.original, self.sample, seed=self.seed, dtype=torch.float64)
        except Incomparable:
            raise
        except Exception as error:  # whatever somebody's forward may raise
            self._explain_failure(error)
        for check, said in zip(found.checks, trouble, strict=True):
            check.trouble = check.trouble or said
        return reference

    def _explain_failure(self, error: Exception) -> NoReturn:
        """A model that does not run in its own dtype either got wrong inputs; else it has no float64 twin."""
        try:
            run(self.subject.original, self.sample, seed=self.seed)
        except Exception as plain:
            raise UsageError(forward_failed(plain)) from plain
        raise NoTwin(f"the model does not run in float64: {type(error).__name__}: {error}") from error

    def _again(self, reference: Any, before: Mapping[str, Tensor]) -> Trail | None:
        """The trail of a second run, with other random numbers; None, and a doubt, if it does not agree."""
        trail, output = self._followed(self.original)
        again = compare(reference, output)
        if again.error <= TOLERANCE:
            return trail
        doubt = f"returns NaN at {again.where}"
        if not again.undefined:
            doubt = f"disagrees with itself on the same input: {self._cause(reference, before)}"
        self.found.erratic.append(f"the original model {doubt}")
        return None

    def _cause(self, reference: Any, before: Mapping[str, Tensor]) -> str:
        again = run(self.original, self.sample, seed=self.seed, dtype=torch.float64)
        if compare(reference, again).error <= TOLERANCE:
            return "it draws random numbers"
        if buffers := changed_buffers(before, self.original):
            return f"it writes to its buffers {', '.join(buffers[:3])}"
        return "it keeps a state outside its buffers, or draws random numbers that no seed controls"

    def locate(self) -> None:
        """Names the group that breaks the whole where each group by itself is right."""
        found, partly_fused = self.found, self.subject.partly_fused
        if partly_fused is None or any(check.differs for check in found.checks):
            return
        if not found.whole_differs:
            if found.too_far:
                self._locate_unwatched(partly_fused)
            return
        # Not the twin itself, whose state its runs have changed.
        trail, reference = self._followed(partly_fused(0))

        def differs(count: int) -> bool:
            try:
                other, output = self._followed(partly_fused(count))
            except Exception:  # a model that half a fold breaks
                return True
            worst = max(compare(reference, output, channels=True).error, trail.against(other).error)
            return worst > found.tolerance

        number = culprit(len(found.checks), differs)
        if number is None:
            why = "a fresh fold of the original agrees with it: something besides the tensors was changed"
            found.end = replace(found.end, why=why)
        else:
            found.checks[number].trouble = _INNER_READER

    def _locate_unwatched(self, partly_fused: Callable[[int], nn.Module]) -> None:
        """Names the group that breaks the whole only as users run it: on a path that no hook or mode sees."""
        try:
            reference = self._unwatched(partly_fused(0))
        except Exception:  # float64 may have no such path
            return

        def differs(count: int) -> bool:
            try:
                return compare(reference, self._unwatched(partly_fused(count))).error > MOST
            except Exception:  # a model that half a fold breaks
                return True

        number = culprit(len(self.found.checks), differs)
        if number is not None:
            self.found.checks[number].trouble = _OUT_OF_SIGHT

    def _unwatched(self, model: nn.Module) -> Any:
        inputs = self.sample.copy(torch.float64)
        with seeded(self.seed), torch.no_grad():
            return cast(model(*inputs.args, **inputs.kwargs), None)
