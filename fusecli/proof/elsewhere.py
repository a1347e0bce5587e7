"""Original and fold at other sizes than the recorded ones: end to end, inside, and what each group gives.

A float32 model is run as it is: what a fold that holds at one size only does elsewhere is far above rounding.
Where the two are further apart than rounding goes, float64 decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fusecli.graph.places import place
from fusecli.outcome import LedgerEntry
from fusecli.proof.compare import MOST, Difference, Incomparable, compare, floating_error
from fusecli.proof.findings import Findings
from fusecli.proof.noise import tolerance
from fusecli.proof.run import run
from fusecli.proof.sizes import Axes, at_other_sizes, sizes_of
from fusecli.proof.trace import End, Trace, followed
from fusecli.proof.whole import Opened, Spans, Twin
from fusecli.sample import Sample

_NONE = Difference()
# Of right float32 twins. A network that amplifies rounding is further apart: then float64 decides.
_ROUNDING = 1e-5


@dataclass
class Elsewhere:
    """original, fused  while they are in memory
    spans, exits     where groups begin and end, and the calls that return what is read outside of them
    """

    original: Opened
    fused: Opened
    sample: Sample
    seed: int
    spans: Spans
    exits: Sequence[End]
    found: Findings
    ledger: list[LedgerEntry] = field(default_factory=list)

    def judge(self, dynamic: Sequence[Axes]) -> None:
        """What they do at other sizes goes to the findings.

        Nothing is asked of models that differ already, or that are no function of their input.
        """
        found = self.found
        if found.erratic or found.whole_differs or any(c.differs for c in found.checks):
            return
        found.sizes = at_other_sizes(self.sample, dynamic, self._differs)
        found.ledger += self.ledger

    def _differs(self, sample: Sample) -> Difference | None:
        narrow = self.found.dtype is torch.float32
        found = self._apart(sample, wide=not narrow)
        if narrow and found is not None and found.error > _ROUNDING:
            found = self._apart(sample, wide=True)
        if found is None or found.undefined:
            return None
        line = _ROUNDING if narrow and found.error <= _ROUNDING else self._tolerance(found.error, sample)
        return found if found.error > line else _NONE

    def _apart(self, sample: Sample, *, wide: bool) -> Difference | None:
        """How far they are from each other on this sample; None where the original does not run on it."""
        try:
            reference, trace = self._run(self.original, sample, wide=wide)
        except Exception:  # whatever somebody's forward may raise: it takes no such input
            return None
        self._note_way(trace, sample)
        try:
            output, other = self._run(self.fused, sample, wide=wide)
            inside = trace.against(other).worse(trace.exits_against(other))
            return compare(reference, output).worse(inside)
        except Incomparable:
            return None
        except Exception as error:
            said = f"the fused model raises {type(error).__name__}: {error}"
            return Difference(math.inf, "output", said)

    def _run(self, opened: Opened, sample: Sample, *, wide: bool) -> tuple[Any, Trace]:
        if wide:
            ran = opened.in_float64(sample, self.seed, self.spans, self.exits)
            return ran.output, ran.trace
        with followed(opened.model, self.spans, self.exits) as trace:
            output = run(opened.model, sample, seed=self.seed)
        return output, trace

    def _tolerance(self, error: float, sample: Sample) -> float:
        """The line for an error here; what the noise is at this size is asked where it decides."""
        found = self.found
        if not found.tolerance < error <= MOST:
            return found.tolerance
        try:
            reference, _ = self._run(self.original, sample, wide=True)
            noise = floating_error(reference, self.original.as_users(sample, self.seed))
        except Exception:  # it runs in float64 only
            return found.tolerance
        return max(found.tolerance, tolerance(noise, found.dtype))

    def culprit(
        self, sample: Sample, partly_fused: Callable[[int], nn.Module], search: Callable[..., int | None]
    ) -> int | None:
        """The group whose fold holds for the recorded size only."""
        whole = replace(self, original=Opened(Twin(lambda: partly_fused(0))), ledger=[*self.ledger, *_SAID])

        def differs(count: int) -> bool:
            part = replace(whole, fused=Opened(Twin(lambda: partly_fused(count))))
            found = part._apart(sample, wide=True)
            # NaN is of the original: no fold has done that.
            return (
                found is not None
                and not found.undefined
                and found.error > self._tolerance(found.error, sample)
            )

        return search(len(self.found.checks), differs)

    def _note_way(self, trace: Trace, sample: Sample) -> None:
        """That forward does other things at other sizes: then it has asked for one."""
        way = self.found.way
        if self.ledger or trace.way == way:
            return
        pairs = enumerate(zip(trace.way, way, strict=False))
        other = next((n for n, (a, b) in pairs if a != b), min(len(trace.way), len(way)))
        with _Placing(other) as placing:
            try:
                run(self.original.model, sample, seed=self.seed)
            except Exception:  # what it keeps of its sizes may not fit any more
                return
        here, there = sizes_of(self.sample), sizes_of(sample)
        what = (
            f"forward goes another way at {there} than at {here}: it decides by sizes, and the verdict "
            "speaks for those that were run"
        )
        self.ledger.append(LedgerEntry("sizes", placing.place or "the model's forward", what))


_SAID = (LedgerEntry("sizes", "", ""),)  # enough to say nothing more


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
