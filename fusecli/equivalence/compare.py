"""Two outputs of one model, compared leaf by leaf, whatever they are nested in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-9  # right folds stay below 6e-12 in float64, wrong ones start at 4e-5: the line is between
# What float64 leaves where numbers of order one cancel: two such outputs are zero but for rounding, so equal.
_RESIDUE = 2.0**-40


_PLAIN = (bool, int, str, bytes, range, set, frozenset, Enum, torch.dtype, torch.device)


class Incomparable(Exception):
    """The outputs hold something whose equality nobody can judge."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """error: the largest max|a-b| / max|a| of all floating leaves; inf where structure, ints or NaNs differ.

    `where` is the path of the worst leaf, `why` says what is wrong where it is no matter of numbers.
    floating   the leaf holds floating numbers, and more than zeros: their error means something in any dtype
    undefined  the original itself is NaN there, so that no output would be equal to it
    """

    error: float = 0.0
    where: str = ""
    why: str = ""
    floating: bool = False
    undefined: bool = False

    def worse(self, other: Difference) -> Difference:
        return other if other.error > self.error or (other.why and not self.why) else self


def compare(a: Any, b: Any) -> Difference:
    """The difference of `b` from `a`; raises Incomparable."""
    worst = Difference()
    try:
        for difference in _leaves(a, b, "output"):
            worst = worst.worse(difference)
    except RecursionError:
        raise Incomparable("output holds itself, which cannot be compared") from None
    return worst


def floating_error(a: Any, b: Any) -> float | None:
    """The largest error of the floating leaves; None where there are none.

    For runs in a stored dtype: there rounding may turn an argmax or the length of a list, which says nothing
    of its size.
    """
    return max((leaf.error for leaf in _leaves(a, b, "output") if leaf.floating), default=None)


def _leaves(a: Any, b: Any, at: str) -> Iterator[Difference]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        yield _tensors(a, b, at)
    elif type(a) is not type(b):
        yield _unequal(at, f"{type(a).__name__} became {type(b).__name__}")
    elif dataclasses.is_dataclass(a) and not isinstance(a, Mapping):
        names = [field.name for field in dataclasses.fields(a)]
        for name in names:
            yield from _leaves(getattr(a, name), getattr(b, name), f"{at}.{name}")
    elif isinstance(a, Mapping):
        if list(a) != list(b):
            yield _unequal(at, f"keys {list(a)} became {list(b)}")
        else:
            for key in a:
                yield from _leaves(a[key], b[key], f"{at}[{key!r}]")
    elif isinstance(a, list | tuple):
        if len(a) != len(b):
            yield _unequal(at, f"{len(a)} items became {len(b)}")
        for i, (left, right) in enumerate(zip(a, b, strict=False)):
            yield from _leaves(left, right, f"{at}[{i}]")
    elif isinstance(a, float | complex):
        dtype = torch.float64 if isinstance(a, float) else torch.complex128
        yield _tensors(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype), at)
    elif a is None or isinstance(a, _PLAIN):
        if a != b:
            yield _unequal(at, f"{a!r} became {b!r}")
    elif hasattr(a, "__array__"):
        yield _tensors(torch.as_tensor(a), torch.as_tensor(b), at)
    elif getattr(a, "__dict__", None) and not isinstance(a, type):
        yield from _leaves(vars(a), vars(b), at)
    else:
        raise Incomparable(f"{at} is a {type(a).__name__}, which cannot be compared")


def _tensors(a: Tensor, b: Tensor, at: str) -> Difference:
    if a.shape != b.shape:
        return _unequal(at, f"shape {list(a.shape)} became {list(b.shape)}")
    if _kind(a) != _kind(b):
        return _unequal(at, f"{a.dtype} became {b.dtype}")
    if a.layout is not torch.strided or b.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if not _kind(a):
        unequal = int((a != b).sum())
        return _unequal(at, f"{unequal} of {a.numel()} integers differ") if unequal else Difference(0.0, at)
    wide = a.to(torch.promote_types(a.dtype, torch.float64))
    gap = float((wide - b).abs().max()) if a.numel() else 0.0
    return _numbers(wide, b, gap, at) if math.isfinite(gap) else _not_finite(wide, b, at)


def _numbers(a: Tensor, b: Tensor, gap: float, at: str) -> Difference:
    """Both hold finite numbers only."""
    if gap == 0.0:
        return Difference(0.0, at, floating=True)
    largest, other = float(a.abs().max()), float(b.abs().max())
    if largest > _RESIDUE:
        return Difference(gap / largest, at, floating=True)
    if other <= _RESIDUE:
        return Difference(0.0, at)
    return Difference(gap / largest if largest else math.inf, at, "zeros became other numbers")


def _not_finite(a: Tensor, b: Tensor, at: str) -> Difference:
    if a.isnan().any() or b.isnan().any():
        undefined = bool(a.isnan().any())
        return Difference(math.inf, at, "NaN, which equals nothing", floating=True, undefined=undefined)
    finite = a.isfinite()
    if not torch.equal(a[~finite], b[~finite].to(a.dtype)) or not b[finite].isfinite().all():
        return Difference(math.inf, at, "infinities differ", floating=True)
    gap = float((a[finite] - b[finite]).abs().max()) if finite.any() else 0.0
    return _numbers(a[finite], b[finite], gap, at)


def _kind(tensor: Tensor) -> str:
    """Twins differ in precision by intent; an integer that becomes a float is another matter."""
    return "floating" if tensor.is_floating_point() else "complex" if tensor.is_complex() else ""


def _unequal(at: str, why: str) -> Difference:
    return Difference(math.inf, at, why)
