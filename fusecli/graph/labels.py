"""Which channel arrives where: labels are put on channels, the recorded ops are run on the labels.

No rule per op: what mixes channels, pads them or puts them on another axis shows in where the labels end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fusecli.graph.dataflow import Call, Recording, Ref
from fusecli.graph.ops import AVERAGES, JOINS, MOVES, NORM_VECTORS, NORMS, POINTWISE, SELECTIONS

CONFLICT = -1  # two labels met in one element
NOWHERE = -2  # no label arrived in this element, though some did beside it


def along(shape: tuple[int, ...], axis: int) -> Tensor:
    """Labels 0, 1, ... along `axis` of a tensor of this shape."""
    size = shape[axis]
    ends = [1] * len(shape)
    ends[axis] = size
    return torch.arange(size, dtype=torch.int32).reshape(ends).expand(shape)


def labels_at(recording: Recording, value: int, seeds: Mapping[int, Tensor | None]) -> Tensor | None:
    """The labels that reach `value` from `seeds`, with its shape; CONFLICT where two meet, NOWHERE where
    none is.

    None where no label arrives. Raises LookupError at an op that does more than move elements or combine
    them one by one.
    """
    try:
        return _Replay(recording, dict(seeds)).at(value)
    except RecursionError:
        raise LookupError("too many ops in a row") from None


@dataclass
class _Replay:
    """The labels of values, each worked out once."""

    recording: Recording
    known: dict[int, Tensor | None]

    def at(self, value: int) -> Tensor | None:
        if value not in self.known:
            self.known[value] = self._work_out(value)
        return self.known[value]

    def _work_out(self, value: int) -> Tensor | None:
        call, shape = self.recording.maker(value), self.recording.values[value].shape
        # An origin that carries no label, such as a constant made by torch.ones, tells nothing.
        if call is None or not call.reads:
            return None
        if call.name in NORMS:
            return _merged(self._norm(call, len(shape)), shape)
        if call.name in MOVES | SELECTIONS:
            source = self.at(call.reads[0])
            return None if source is None else moved(call, source, call.makes.index(value))
        if call.name in JOINS:
            return self._joined(call)
        if call.name in AVERAGES:
            source = self.at(call.reads[0])
            return None if source is None else _averaged(call, source)
        if call.name in POINTWISE:
            return _merged([self.at(read) for read in call.reads], shape)
        raise LookupError(self.recording.described(call))

    def _norm(self, call: Call, rank: int) -> list[Tensor | None]:
        operands = [self.at(call.reads[0])]
        for position in NORM_VECTORS:
            vector = call.argument(position)
            labels = None if vector is None else self.at(vector)
            operands.append(None if labels is None else labels.reshape(1, -1, *(1,) * (rank - 2)))
        return operands

    def _joined(self, call: Call) -> Tensor | None:
        parts = {read: self.at(read) for read in call.reads}
        if all(labels is None for labels in parts.values()):
            return None

        def part(ref: Ref) -> Tensor:
            labels, shape = parts[ref.value], self.recording.values[ref.value].shape
            return torch.tensor(NOWHERE, dtype=torch.int32).expand(shape) if labels is None else labels

        result: Tensor = call.op(*tree_map_only(Ref, part, call.args), **call.kwargs)
        return result


def moved(call: Call, tensor: Tensor, number: int = 0) -> Tensor:
    """What a recorded op that only moves elements makes of `tensor`, which keeps its dtype; of several
    results the one of this number."""
    if call.name == "aten._to_copy":
        return tensor
    args = tree_map_only(Ref, lambda _: tensor.contiguous(), call.args)
    result: Any = call.op(*args, **call.kwargs)
    found: Tensor = result if isinstance(result, Tensor) else result[number]
    return found


def _averaged(call: Call, labels: Tensor) -> Tensor:
    """A mean of equal labels is that label, of others none: each label is a random number, and the op's own
    result is looked up among them. A padding that is counted gives no number of any label."""
    known, places = labels.unique(return_inverse=True)
    numbers = torch.rand(len(known), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    order = numbers.argsort()
    means = moved(call, numbers[places])
    nearest = torch.searchsorted(numbers[order], means - 1e-9).clamp(max=len(known) - 1)
    found = order[nearest]
    right = (numbers[found] - means).abs() < 1e-9
    return torch.where(right, known[found], CONFLICT).to(labels.dtype)


def _merged(operands: list[Tensor | None], shape: tuple[int, ...]) -> Tensor | None:
    spread = [labels.expand(shape) for labels in operands if labels is not None]
    if not spread:
        return None
    # Axes along which no operand has labels of its own are looked at once.
    thin = [slice(None) if any(o.stride(i) for o in spread) else slice(0, 1) for i in range(len(shape))]
    first, *others = (labels[tuple(thin)] for labels in spread)
    for other in others:
        met = torch.where(first == other, first, CONFLICT)
        first = torch.where(first == NOWHERE, other, torch.where(other == NOWHERE, first, met))
    return first.expand(shape)
