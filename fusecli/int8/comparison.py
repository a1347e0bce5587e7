"""An int8 model against the float model it was made from: what comes out, and every unit on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fusecli.int8.numbers import Sums
from fusecli.int8.watching import Watch, run, watched
from fusecli.sample import Sample, tensors_in


@dataclass(frozen=True)
class Likeness:
    """How like the float value of the node `output` its int8 value is, over all samples."""

    output: str
    sqnr: float
    cosine: float


@dataclass(frozen=True)
class Comparison:
    """An int8 model against the float model it was made from, on the same samples.

    units         for each unit's output, in the order asked for
    sqnr, cosine  of the model's output, of its floating leaf where they are lowest; None where it has none.
                  The cosine is the mean over the rows of all batches, as of `numbers.cosine`
    worst_cosine  of the one row of a batch that fares worst
    top1          of the first floating leaf, None where that is no [n, classes > 1]
    samples       forward calls that were compared
    """

    units: tuple[Likeness, ...]
    sqnr: float | None
    cosine: float | None
    worst_cosine: float | None
    top1: float | None
    samples: int


def compare(
    reference: fx.GraphModule, int8: fx.GraphModule, outputs: Sequence[str], samples: Sequence[Sample]
) -> Comparison:
    """Both graphs on all samples: each named node by what is passed on of it, and the floating outputs.

    Of one sample at a time the float values are kept, each until its int8 value is there.
    Raises ValueError without samples, and where a graph lacks a node or the outputs differ in shape.
    """
    if not samples:
        raise ValueError("nothing to compare: no samples were given")
    units, leaves = {name: Sums() for name in outputs}, list[Sums]()
    for sample in samples:
        expected, found = _both(reference, int8, units, sample)
        leaves = leaves or [Sums() for _ in expected]
        for leaf, x, y in zip(leaves, expected, found, strict=True):
            leaf.add_rows(x, y)
    likeness = tuple(Likeness(name, leaf.sqnr, leaf.cosine) for name, leaf in units.items())
    return _judged(likeness, leaves, len(samples))


def _both(
    reference: fx.GraphModule, int8: fx.GraphModule, units: Mapping[str, Sums], sample: Sample
) -> tuple[list[Tensor], list[Tensor]]:
    expected, kept = watched(reference, units, sample)
    watch = Watch(int8, units, lambda name, value: units[name].add(kept.pop(name), value))
    return _floating(expected), _floating(run(watch, sample))


def _judged(units: tuple[Likeness, ...], leaves: list[Sums], samples: int) -> Comparison:
    return Comparison(
        units,
        min((leaf.sqnr for leaf in leaves), default=None),
        min((leaf.mean_cosine for leaf in leaves), default=None),
        min((leaf.worst_cosine for leaf in leaves), default=None),
        leaves[0].top1 if leaves else None,
        samples,
    )


def _floating(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.numel()]
