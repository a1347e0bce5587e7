"""Other sizes: a fold that one size has shown need not hold at others.

A convolution that pads by size, `if x.shape[-1] % 2`, a pool whose last window is cut off: recorded at one
size, each is another function at the next. So each axis of the inputs is made one longer, as far as the
original runs so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from fusecli.proof.compare import Difference
from fusecli.sample import Sample, tensors_in

Axes = tuple[int, ...] | None  # of one input those that may vary; None: any
Change = frozenset[tuple[int, int]]  # which input, counted from 0, is longer along which of its axes
_ATTEMPTS = 32  # one that the original does not take ends early


@dataclass
class Shown:
    """For which sizes a verdict speaks.

    at      the sample's own
    others  those that were run besides
    wrong   the first at which original and fold differ, with its inputs and by how much
    """

    at: str
    others: list[str] = field(default_factory=list)
    fixed: bool = False
    wrong: tuple[str, Sample, Difference] | None = None

    @property
    def sentence(self) -> str:
        if self.wrong is not None:
            return f"equal at {self.at}, but not at {self.wrong[0]}"
        if self.others:
            return f"equal at {_listed([self.at, *self.others])}; inputs of another rank were not tried"
        why = (
            "the spec says that sizes are fixed"
            if self.fixed
            else "the original runs at no other that was tried"
        )
        return f"the verdict speaks for {self.at} only: {why}"


def at_other_sizes(
    sample: Sample, dynamic: Sequence[Axes], differs: Callable[[Sample], Difference | None]
) -> Shown:
    """What `differs` says of the sample made longer, axis by axis, the batch with the first of them.

    dynamic  for each tensor of the sample the axes that may vary; shorter than there are tensors: any
    differs  the difference where there is one beyond rounding, one without error where there is none, None
             where the original does not run so
    """
    tensors = tensors_in((sample.args, dict(sample.kwargs)))
    free = [_free(t, dynamic[i] if i < len(dynamic) else None) for i, t in enumerate(tensors)]
    shown = Shown(sizes_of(sample), fixed=bool(tensors) and not any(free))
    batch, others = _batch(tensors, free), list(_others(tensors, free))
    tried: dict[Change, bool] = {}

    def runs(change: Change) -> bool:
        """Whether the original runs so; what is found goes to `shown`."""
        if change in tried:
            return tried[change]
        if not change or shown.wrong is not None or len(tried) >= _ATTEMPTS:
            return False
        longer = _longer(sample, change)
        found = differs(longer)
        tried[change] = found is not None
        if found is None:
            return False
        name = sizes_of(longer)
        if found.error > 0:
            shown.wrong = name, longer, found
        else:
            shown.others.append(name)
        return True

    # The batch goes with the first axis that goes. Where it does not go with one of those that mostly do, it
    # is tried alone: if it goes so, the axis is to blame.
    together, apart = not batch, False
    for choices in others:
        for change in choices:
            if not (together or apart):
                together = runs(batch | change)
                apart = not together and max(axis for _, axis in change) > 1 and runs(batch)
                if together:
                    break
                if apart:
                    continue
            if runs(change):
                break
    if not together:
        runs(batch)
    return shown


def sizes_of(sample: Sample) -> str:
    """The shapes of a sample's tensors, as on the command line: '1x3x224x224, 1x16'."""
    return ", ".join(map(_size_of, tensors_in((sample.args, dict(sample.kwargs)))))


def _size_of(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "a nested tensor"
    return "x".join(map(str, tensor.shape)) or "a number"


def _free(tensor: Tensor, named: Axes) -> frozenset[int]:
    if tensor.is_nested or tensor.layout is not torch.strided or not tensor.numel():
        return frozenset()
    axes = range(tensor.ndim)
    return frozenset(axis for axis in axes if named is None or axis in {a % tensor.ndim for a in named})


def _batch(tensors: Sequence[Tensor], free: Sequence[frozenset[int]]) -> Change:
    """The first axis of everything that has as many rows as the first input."""
    first = next((t.shape[0] for t, axes in zip(tensors, free, strict=True) if 0 in axes), None)
    return frozenset((i, 0) for i, t in enumerate(tensors) if 0 in free[i] and t.shape[0] == first)


def _others(tensors: Sequence[Tensor], free: Sequence[frozenset[int]]) -> Iterator[tuple[Change, ...]]:
    """Every other axis, with what may have to grow along: axes that are as long, the likelier first."""
    for i, tensor in enumerate(tensors):
        for axis in range(1, tensor.ndim):
            if axis in free[i]:
                yield tuple(dict.fromkeys(_choices(tensors, free, i, axis)))


def _choices(
    tensors: Sequence[Tensor], free: Sequence[frozenset[int]], number: int, axis: int
) -> Iterator[Change]:
    """A mask beside what it masks has the same axis, counted from either end, or, of pairs, twice; some
    networks take squares only."""
    own, rank, size = (number, axis), tensors[number].ndim, tensors[number].shape[axis]
    alike = [
        (i, a) for i, t in enumerate(tensors) for a in range(1, t.ndim) if a in free[i] and t.shape[a] == size
    ]
    others = [(i, a) for i, a in alike if i != number]
    alone = frozenset([own])
    yield alone.union((i, a) for i, a in others if a == axis or tensors[i].ndim != rank)
    yield alone.union(others)
    yield alone.union((i, a) for i, a in others if a - tensors[i].ndim == axis - rank)
    yield alone.union((i, a) for i, a in others if a == axis)
    yield alone
    yield alone.union(alike)


def _longer(sample: Sample, change: Change) -> Sample:
    """With one more slice along these axes, like the last: of its dtype, in its range, and in its order."""
    numbers = count()

    def longer(tensor: Tensor) -> Tensor:
        number = next(numbers)
        for i, axis in sorted(change):
            if i == number:
                tensor = torch.cat([tensor, tensor.narrow(axis, tensor.shape[axis] - 1, 1)], axis)
        return tensor

    return sample.mapped(longer)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
