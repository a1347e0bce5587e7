"""An int8 model against the float model it was made from: what comes out, and every unit on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fusecli.int8.channels import Channels, channel_axes
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
class Worst:
    """A number of the channel that fares worst, and which one that is: 'channel 5 of 8'."""

    value: float
    place: str


@dataclass(frozen=True)
class Comparison:
    """An int8 model against the float model it was made from, on the same samples.

    units         for each unit's output, in the order asked for
    sqnr, cosine  of the model's output, of its floating leaf where they are lowest; None where it has none.
                  The cosine is the mean over the rows of all batches, as of `numbers.cosine`; rows of one
                  number have none, for that is a sign
    worst_cosine  of the one row of a batch that fares worst
    top1          of the first floating leaf, None where that is no [n, classes > 1]
    samples       forward calls that were compared
    channel_sqnr, channel_cosine
                  of the channel of any floating leaf that fares worst (`channels`); None without such a leaf
    constant      channels that are one number in int8, and not in float
    lost          those of them that vary by more than eight bits need
    """

    units: tuple[Likeness, ...]
    sqnr: float | None
    cosine: float | None
    worst_cosine: float | None
    top1: float | None
    samples: int
    channel_sqnr: Worst | None = None
    channel_cosine: Worst | None = None
    constant: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def compare(
    reference: fx.GraphModule, int8: fx.GraphModule, outputs: Sequence[str], samples: Sequence[Sample]
) -> Comparison:
    """Both graphs on all samples: each named node by what is passed on of it, and the floating outputs.

    Of one sample at a time the float values are kept, each until its int8 value is there.
    Raises ValueError without samples, and where a graph lacks a node or the outputs differ in shape.
    """
    if not samples:
        raise ValueError("nothing to compare: no samples were given")
    units, leaves = {name: Sums() for name in outputs}, list[_Leaf]()
    for sample in samples:
        expected, found = _both(reference, int8, units, sample)
        leaves = leaves or [_Leaf(by_rows(x, sample)) for x in expected]
        for leaf, x, y in zip(leaves, expected, found, strict=True):
            leaf.add_both(by_rows(x, sample), by_rows(y, sample))
    likeness = tuple(Likeness(name, leaf.sqnr, leaf.cosine) for name, leaf in units.items())
    return _judged(likeness, leaves, len(samples))


def _both(
    reference: fx.GraphModule, int8: fx.GraphModule, units: Mapping[str, Sums], sample: Sample
) -> tuple[list[Tensor], list[Tensor]]:
    expected, kept = watched(reference, units, sample)
    watch = Watch(int8, units, lambda name, value: units[name].add(kept.pop(name), value))
    return floating(expected), floating(run(watch, sample))


class _Leaf(Sums):
    """One floating tensor of the output: as a whole, by rows and by channels."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.axes = {axis: Channels(axis) for axis in channel_axes(value)}
        self.single = True

    def add_both(self, x: Tensor, y: Tensor) -> None:
        self.add_rows(x, y)
        self.single = self.single and single(x)
        for channels in self.axes.values():
            channels.add(x.detach().double(), y.detach().double())


def _judged(units: tuple[Likeness, ...], leaves: list[_Leaf], samples: int) -> Comparison:
    rows = [leaf for leaf in leaves if not leaf.single]
    return Comparison(
        units,
        min((leaf.sqnr for leaf in leaves), default=None),
        min((leaf.mean_cosine for leaf in rows), default=None),
        min((leaf.worst_cosine for leaf in rows), default=None),
        leaves[0].top1 if leaves else None,
        samples,
        min(_each(leaves, "sqnr"), key=_value, default=None),
        min(_each(leaves, "cosine"), key=_value, default=None),
        *(tuple(w.place for w in _each(leaves, what) if w.value) for what in ("constant", "lost")),
    )


def _value(worst: Worst) -> float:
    return worst.value


def _each(leaves: Sequence[_Leaf], what: str) -> Iterator[Worst]:
    """That number of every channel of every leaf."""
    for number, leaf in enumerate(leaves):
        for axis, channels in leaf.axes.items():
            if not channels.whole:
                continue
            values = getattr(channels, what).tolist()
            of = f" of axis {axis}" if len(leaf.axes) > 1 else ""
            of += f" of output {number}" if len(leaves) > 1 else ""
            for index, value in enumerate(values):
                yield Worst(float(value), f"channel {index} of {len(values)}{of}")


def by_rows(value: Tensor, sample: Sample) -> Tensor:
    """[n] of a batch of n as rows of one number, [n, 1]; one number as one row; everything else as it is."""
    if value.ndim == 0:
        return value.reshape(1, 1)
    given = next((tensor for tensor in tensors_in((sample.args, dict(sample.kwargs))) if tensor.ndim), None)
    rows = value.ndim == 1 and given is not None and len(value) == len(given)
    return value[:, None] if rows else value


def single(value: Tensor) -> bool:
    """Whether a row of the value is one number: its cosine is a sign, and says nothing of how large it is."""
    return value.numel() == (len(value) if value.ndim > 1 else 1)


def floating(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.numel()]
