"""Which channel arrives where: labels are put on channels, the recorded ops are run on the labels.

No rule per op: what mixes channels, pads them or puts them on another axis shows in where the labels end.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    if value in seeds:
        return seeds[value]
    call = recording.maker(value)
    if call is None:
        return None
    if call.name in NORMS:
        return _through_norm(recording, call, seeds)
    if call.name in MOVES:
        source = labels_at(recording, call.reads[0], seeds)
        return None if source is None else moved(call, source)
    if call.name in POINTWISE:
        found = [labels_at(recording, read, seeds) for read in call.reads]
        return _merged([labels for labels in found if labels is not None], recording.values[value].shape)
    # An origin that carries no label, such as a constant made by torch.ones, tells nothing.
    if not call.reads:
        return None
    raise LookupError(recording.described(call))


def _through_norm(recording: Recording, call: Call, seeds: Mapping[int, Tensor]) -> Tensor | None:
    shape = recording.values[call.makes[0]].shape
    operands = [labels_at(recording, call.reads[0], seeds)]
    for position in NORM_VECTORS:
        vector = call.argument(position)
        labels = None if vector is None else labels_at(recording, vector, seeds)
        operands.append(None if labels is None else labels.reshape(1, -1, *(1,) * (len(shape) - 2)))
    return _merged([labels for labels in operands if labels is not None], shape)


def moved(call: Call, tensor: Tensor) -> Tensor:
    """What a recorded op that only moves elements makes of `tensor`, which keeps its dtype."""
    if call.name == "aten._to_copy":
        return tensor
    args = tree_map_only(Ref, lambda _: tensor.contiguous(), call.args)
    result: Tensor = call.op(*args, **call.kwargs)
    return result


def _merged(operands: list[Tensor], shape: tuple[int, ...]) -> Tensor | None:
    if not operands:
        return None
    spread = [labels.expand(shape) for labels in operands]
    # Axes along which no operand has labels of its own are looked at once.
    thin = [slice(None) if any(o.stride(i) for o in spread) else slice(0, 1) for i in range(len(shape))]
    first, *others = (labels[tuple(thin)] for labels in spread)
    for other in others:
        first = torch.where(first == other, first, CONFLICT)
    return first.expand(shape)
