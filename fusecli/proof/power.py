"""Weights that are off by 1 %: a check that would not notice them proves nothing.

A weight that is 0 is put off like the others, by 1 % of the largest of its tensor. Where all of them are 0,
as behind a norm whose gamma is, it is put off by 1 % of the tensors that it was folded from: 0 is the right
answer there as any other number is elsewhere, and a wrong one has their size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

PERTURBATION = 0.01


def put_off(fused: Sequence[nn.Module], before: Sequence[nn.Module]) -> None:
    """Gives the modules of a group other weights, all off by 0.5 to 1 %.

    fused   float64 modules, whose tensors may be those of others: they are not written to
    before  the modules of the group as they were; empty where nobody knows them
    """
    for weight in _weights(fused):
        moved = weight.data.clone(memory_format=torch.contiguous_format)
        flat = moved.view(-1)
        steps, usual = _pattern().to(flat.device, flat.dtype), _usual(moved, before)
        rows, rest = divmod(len(flat), len(steps))
        move(flat[: len(flat) - rest].view(rows, len(steps)), steps, usual)
        move(flat[len(flat) - rest :], steps[:rest], usual)
        weight.data = moved


def _usual(weight: Tensor, before: Sequence[nn.Module]) -> float:
    """What stands for a 0 in `weight`: its largest number, or that of what it was made from."""
    if bool(weight.all()):
        return 0.0
    return largest(weight) or max(map(largest, _weights(before)), default=0.0) or 1.0


@cache
def _pattern() -> Tensor:
    # Of prime length: the numbers of no two channels are off alike.
    return 0.5 + 0.5 * torch.rand(1021, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def move(weight: Tensor, step: Tensor, usual: float) -> None:
    """Puts each number of `weight` off by `step` per cent of itself; a 0 by that of `usual`, where that is no
    0 itself."""
    numbers = weight.data
    size = numbers.where(numbers != 0, usual) if usual and not bool(numbers.all()) else numbers
    numbers.addcmul_(size, step, value=PERTURBATION)


def _weights(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The matrices and kernels among their parameters; where there are none, all; else the buffers."""
    parameters: list[Tensor] = [p for module in modules for p in module.parameters() if p.is_floating_point()]
    buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
    return [p for p in parameters if p.ndim > 1] or parameters or buffers


def largest(tensor: Tensor) -> float:
    return float(tensor.data.abs().max()) if tensor.numel() else 0.0
