"""Do the stored tensors hold the fold? Each is compared with its float64 value, bit by bit where nothing was folded."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fusecli.algebra import round_once
from fusecli.errors import NotFoldable

# A custom fuser does its own arithmetic: its tensors may be off by this many units in the last place.
_FOREIGN_ULPS = 64


def misstored(
    exact: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    folded: Collection[str],
    foreign: Collection[str] = (),
) -> list[str]:
    """Keys whose stored tensor is not the rounded value of the exact one.

    Kept tensors must be equal; those in `folded` must be one of the two neighbours of the exact value;
    those in `foreign` within 64 units in the last place of their tensor's largest value.
    """
    wrong = sorted(exact.keys() ^ stored.keys())
    for key in exact.keys() & stored.keys():
        if not holds_fold(exact[key], stored[key], key in folded, key in foreign):
            wrong.append(key)
    return sorted(wrong)


def holds_fold(exact: Tensor, stored: Tensor, folded: bool, foreign: bool = False) -> bool:
    """Whether `stored` is `exact` in its own dtype, as strictly as `misstored` says."""
    if exact.shape != stored.shape:
        return False
    if not stored.is_floating_point():
        return torch.equal(exact, stored)
    if not folded and not foreign:
        return torch.equal(_rounded(exact, stored.dtype).isnan(), stored.isnan()) and torch.equal(
            _rounded(exact, stored.dtype).nan_to_num(), stored.nan_to_num()
        )
    limits = torch.finfo(stored.dtype)
    size = exact.abs().max() if foreign and exact.numel() else exact.abs()
    ulps = _FOREIGN_ULPS if foreign else 1
    allowed = (size * limits.eps * ulps).clamp(min=limits.smallest_normal * limits.eps)
    return bool(((stored.double() - exact).abs() <= allowed).all())


def _rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    try:
        return round_once(exact.double(), dtype)
    except NotFoldable:  # a kept tensor may hold infinities; nothing was folded, so nothing overflowed
        return exact.to(dtype)
