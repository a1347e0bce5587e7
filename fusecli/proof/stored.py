"""Does a stored tensor hold the fold? It is compared with its float64 value, strictly if it was kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusecli.proof.run import dense

# A custom fuser does its own arithmetic: its tensors may be off by this many units in the last place.
_FOREIGN_ULPS = 64


def same_state(a: Any, b: Any) -> bool:
    """What a module's get_extra_state answers is no tensor, but may hold some; nobody folds it."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same_state, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    return bool(a == b)


def holds_fold(exact: Tensor, stored: Tensor, folded: bool, foreign: bool = False) -> bool:
    """Whether `stored` is `exact` in its own dtype: one of its two neighbours there where it was `folded`,
    within 64 units in the last place of the largest value where it is `foreign`, else the very same."""
    if exact.layout != stored.layout:
        return False
    exact, stored = dense(exact), dense(stored)
    if exact.shape != stored.shape or exact.is_floating_point() != stored.is_floating_point():
        return False
    if not stored.is_floating_point():
        return exact.dtype == stored.dtype and torch.equal(exact, stored)
    if not folded and not foreign:
        # The exact value of a kept tensor is the original's own: a stored one that is narrower has lost bits.
        return bool(torch.isclose(stored.double(), exact.double(), rtol=0, atol=0, equal_nan=True).all())
    if torch.equal(exact.to(stored.dtype), stored):
        return True
    gap = (stored.double() - exact).abs()
    if not foreign:
        return bool((gap < _last_place(exact, stored.dtype)).all())
    largest = exact.abs().max() if exact.numel() else exact.new_zeros(())
    return bool((gap <= _FOREIGN_ULPS * _last_place(largest, stored.dtype)).all())


def _last_place(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of the two elements of `dtype` that `exact` lies between."""
    limits = torch.finfo(dtype)
    _, exponent = torch.frexp(exact.abs().clamp(min=limits.smallest_normal))
    return torch.ldexp(torch.full_like(exact, limits.eps), exponent - 1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
        return False
    a, b = dense(a), dense(b)
    # NaN is equal to NaN here: the question is whether the bytes were kept.
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
