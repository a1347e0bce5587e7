"""Which channel arrives where: labels are put on channels, the recorded ops are run on the labels.

No rule per op: what mixes channels, pads them or puts them on another axis shows in where the labels end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fusecli.graph.dataflow import Call, Recording, Ref
from fusecli.graph.ops import MOVES, NORM_VECTORS, NORMS, POINTWISE

CONFLICT = -1  # two labels met in one element


def along(shape: tuple[int, ...], axis: int) -> Tensor:
    """Labels 0, 1, ... along `axis` of a tensor of this shape."""
    size = shape[axis]
    ends = [1] * len(shape)
    ends[axis] = size
    return torch.arange(size, dtype=torch.int32).reshape(ends).expand(shape)


def labels_at(recording: Recording, value: int, seeds: Mapping[int, Tensor]) -> Tensor | None:
    """The labels that reach `value` from `seeds`, with its shape; CONFLICT where two meet.

    None where no label arrives. Raises LookupError at an op that does more than move elements or combine
    them one by one.
    """
    return _Replay(recording, dict(seeds)).at(value)


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
        if call.name in MOVES:
            source = self.at(call.reads[0])
            return None if source is None else moved(call, source)
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


def moved(call: Call, tensor: Tensor) -> Tensor:
    """What a recorded op that only moves elements makes of `tensor`, which keeps its dtype."""
    if call.name == "aten._to_copy":
        return tensor
    args = tree_map_only(Ref, lambda _: tensor.contiguous(), call.args)
    result: Tensor = call.op(*args, **call.kwargs)
    return result


def _merged(operands: list[Tensor | None], shape: tuple[int, ...]) -> Tensor | None:
    spread = [labels.expand(shape) for labels in operands if labels is not None]
    if not spread:
        return None
    # Axes along which no operand has labels of its own are looked at once.
    thin = [slice(None) if any(o.stride(i) for o in spread) else slice(0, 1) for i in range(len(shape))]
    first, *others = (labels[tuple(thin)] for labels in spread)
    for other in others:
        first = torch.where(first == other, first, CONFLICT)
    return first.expand(shape)
