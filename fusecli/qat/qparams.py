"""Scale and zero point as a fake quantizer has learned them, with the integers that they are meant for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Integers = tuple[int, int]
UNSIGNED: Integers = (0, 255)
SIGNED: Integers = (-128, 127)
# What torch.ao rounds to: quint8 and qint8, also in fewer bits and without the lowest integer.
_UNSIGNED = tuple((0, 2**bits - 1) for bits in range(8, 2, -1))
_SIGNED = tuple(
    (least - 2 ** (bits - 1), 2 ** (bits - 1) - 1) for bits in range(8, 2, -1) for least in (0, 1)
)
# And where their dtype has more bits.
_WIDE = tuple(
    pair for bits in range(9, 17) for pair in ((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (0, 2**bits - 1))
)
_ROOM = 1e-3  # of a scale; what lies between two of these ranges is 4e-3 and more


@dataclass(frozen=True)
class QParams:
    """x is stored as q, and is (q - zero_point) scale, where q is one of the integers lowest..highest.

    scale, zero_point   one of each, or one for each channel
    """

    scale: Tensor
    zero_point: Tensor
    integers: Integers

    def within(self, integers: Integers) -> QParams:
        """The same numbers for integers of the other sign, where these do not fit: q and zero point move by
        128."""
        lowest, highest = self.integers
        if integers[0] <= lowest and highest <= integers[1]:
            return self
        step = 128 if lowest < 0 else -128
        moved = (lowest + step, highest + step)
        return QParams(self.scale, self.zero_point + step, moved)


def unobserved(scale: Tensor, lowest: Tensor | None, highest: Tensor | None) -> str:
    """Why a fake quantizer's scale is none that data have given; "" if it is one.

    lowest, highest   what its observer has seen, min_val and max_val; None: it has no observer
    """
    if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
        return "it is no positive number"
    for seen in (lowest, highest):
        # Before the first step they are inf and -inf, or of a weight with channels empty.
        if seen is not None and not (seen.numel() and bool(torch.isfinite(seen).all())):
            return "its observer has never seen a value"
    return ""


def too_wide(scale: Tensor, zero_point: Tensor, lowest: Tensor | None, highest: Tensor | None) -> str:
    """Why a scale was made for integers that eight bits do not hold; "" if it was not, or nothing tells."""
    least, most = int(zero_point.min()), int(zero_point.max())
    wide = least < SIGNED[0] or most > UNSIGNED[1]
    if not wide and lowest is not None and highest is not None:
        low, high = lowest.double().flatten().clamp(max=0), highest.double().flatten().clamp(min=0)
        made = (pair for integers in _WIDE for pair in _made(low, high, integers))
        wide = any(_fits(scale, zero_point, *pair) for pair in made)
    return "it was learned for integers of more than 8 bits" if wide else ""


def integers_of(
    scale: Tensor, zero_point: Tensor, lowest: Tensor | None, highest: Tensor | None, *, weight: bool
) -> Integers:
    """The range of integers that scale and zero point were made for, which no state dict holds.

    It is the one that gives this scale and this zero point for the values that were seen, by the equations of
    `TensorScheme`. Where none does (a histogram's search, scales that were trained), the zero point tells.
    """
    likely = (*_SIGNED, *_UNSIGNED) if weight else (*_UNSIGNED, *_SIGNED)
    if lowest is not None and highest is not None:
        low, high = (seen.double().flatten() for seen in (lowest, highest))
        low, high = low.clamp(max=0), high.clamp(min=0)
        for integers in likely:
            if any(_fits(scale, zero_point, *made) for made in _made(low, high, integers)):
                return integers
        below = low / scale.double().flatten()
        # Nothing unsigned has a zero point of 0 and values below it.
        if not bool(zero_point.any()) and bool((below < -0.5).any()):
            return SIGNED
    if bool((zero_point < 0).any()):
        return SIGNED
    if weight and not bool(zero_point.any()):
        return SIGNED
    return UNSIGNED


def _made(low: Tensor, high: Tensor, integers: Integers) -> Iterator[tuple[Tensor, Tensor]]:
    """Scale and zero point of a range of values, affine and symmetric."""
    least, most = integers
    scale = ((high - low) / (most - least)).clamp(min=torch.finfo(torch.float32).eps)
    yield scale, (least - (low / scale).round()).clamp(least, most)
    scale = (2 * torch.maximum(-low, high) / (most - least)).clamp(min=torch.finfo(torch.float32).eps)
    yield scale, torch.full_like(scale, 0 if least < 0 else (least + most + 1) // 2)


def _fits(scale: Tensor, zero_point: Tensor, made: Tensor, middle: Tensor) -> bool:
    wide, whole = scale.double().flatten(), zero_point.double().flatten()
    room = max(_ROOM, torch.finfo(scale.dtype).eps)
    if made.numel() not in (1, wide.numel()):
        return False
    return bool(((wide - made).abs() <= room * made).all()) and bool(((whole - middle).abs() <= 1).all())
