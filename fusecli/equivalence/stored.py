"""Do the stored tensors hold the fold? Each is compared with its float64 value, strictly if it was kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from fusecli.equivalence.run import dense

# A custom fuser does its own arithmetic: its tensors may be off by this many units in the last place.
_FOREIGN_ULPS = 64


def misstored(
    exact: Mapping[str, Any],
    stored: Mapping[str, Any],
    folded: Collection[str],
    foreign: Collection[str] = (),
) -> list[str]:
    """Keys whose stored tensor is not the rounded value of the exact one.

    Kept tensors must be equal; those in `folded` must be one of the two neighbours of the exact value;
    those in `foreign` within 64 units in the last place of their tensor's largest value.
    """
    wrong = sorted(exact.keys() ^ stored.keys())
    for key in exact.keys() & stored.keys():
        if not _holds(exact[key], stored[key], key in folded, key in foreign):
            wrong.append(key)
    return sorted(wrong)


def _holds(exact: Any, stored: Any, folded: bool, foreign: bool) -> bool:
    if isinstance(exact, Tensor) and isinstance(stored, Tensor):
        return holds_fold(exact, stored, folded, foreign)
    return same_state(exact, stored)


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
    """Whether `stored` is `exact` in its own dtype, as strictly as `misstored` says."""
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
