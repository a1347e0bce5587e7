"""Walking a weight block by block, so that its float64 image never exists as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fusecli.algebra.rounding import require_finite, round_into

# 1 MiB of float64: a block stays in the cache between the product, the rounding and the check. Smaller
# ones spend their time in Python, larger ones in main memory.
BLOCK = 1 << 17


@contextmanager
def undivided() -> Iterator[int]:
    """Inside, torch does each operation on the thread that asks for it; yields how many threads it had.

    For work in blocks: dividing each among threads is a little faster on an idle machine, and ten times
    slower on a busy one, where they wait for each other at every block.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching views of `tensors`, which broadcast against the first, of at most BLOCK elements of it.

    Cuts run along the axis that is outermost in the memory of the first tensor, so that each block
    is one stretch of memory. Together the blocks cover every element once.
    """
    lead = tensors[0]
    if lead.numel() <= BLOCK:
        yield tensors
        return
    axis = max(range(lead.ndim), key=lambda d: (lead.shape[d] > 1, lead.stride(d)))
    size = lead.shape[axis]
    step = max(1, size * BLOCK // lead.numel())
    for start in range(0, size, step):
        count = min(step, size - start)
        yield from blocks(*(t if t.shape[axis] == 1 else t.narrow(axis, start, count) for t in tensors))


def scaled(weight: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * factor, multiplied in float64 and rounded once to `dtype`.

    Shapes: weight [g, o, i, *k], factor [g or 1, o or 1, i or 1, 1, ...] in float64. The result has
    the memory order of `weight`. Peak extra memory: the result and one block.
    Raises NotFoldable "overflow" and "not-finite" as round_once does.
    """
    if weight.is_meta:
        # empty_like would import sympy for its strides.
        return torch.empty_strided(weight.shape, weight.stride(), dtype=dtype, device="meta")
    result = torch.empty_like(weight, dtype=dtype)
    if dtype is torch.float64:
        for source, multiplier, target in blocks(weight, factor, result):
            require_finite(target.copy_(source).mul_(multiplier), target)
        return result
    wide = torch.empty(0, dtype=torch.float64)
    for source, multiplier, target in blocks(weight, factor, result):
        if wide.shape != source.shape:
            wide = torch.empty_like(source, dtype=torch.float64)
        # Widening by a copy and multiplying in place is a third faster than the mixed product.
        round_into(target, wide.copy_(source).mul_(multiplier))
    return result
