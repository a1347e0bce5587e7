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
MOST = 1e-6  # no noise raises the line above this
# What float64 leaves where numbers of order one cancel: two such outputs are zero but for rounding, so equal.
RESIDUE = 2.0**-40
# Where numbers cancel, what is left has the rounding of the numbers before: an error is held against this
# part of them. Those above LARGE are the fillings of masks, which nothing is subtracted from.
LEFT_OVER = 2.0**-14
LARGE = 1e6

_PLAIN = (bool, int, str, bytes, range, set, frozenset, Enum, torch.dtype, torch.device)


class Incomparable(Exception):
    """The outputs hold something whose equality nobody can judge."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """error: the largest max|a-b| / max|a| of all floating leaves; inf where structure, ints or NaNs differ.

    What is equal in both has no part in max|a|, so that the constants of a mask hide nothing.
    `where` is the path of the worst leaf, `why` says what is wrong where it is no matter of numbers.
    floating   the leaf holds floating numbers, and more than zeros: their error means something in any dtype
    undefined  the original itself is NaN there, so that no output would be equal to it
    """

    error: float = 0.0
    where: str = ""
    why: str = ""
    floating: bool = False
    undefined: bool = False

    def __post_init__(self) -> None:
        if math.isnan(self.error):  # no comparison with a tolerance would ever find it
            object.__setattr__(self, "error", math.inf)

    def worse(self, other: Difference) -> Difference:
        """The worse of the two, in a total order: of many the same one is left however they are combined."""
        return other if other._rank > self._rank else self

    @property
    def _rank(self) -> tuple[bool, float, bool]:
        """What surely differs comes before what nobody can judge, because the original is NaN there."""
        return self.error > MOST and not self.undefined, self.error, bool(self.why)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two tensors of one shape, layout and kind of number at the same place, `at`, of two outputs."""

    at: str
    a: Tensor
    b: Tensor

    @property
    def numbers(self) -> bool:
        """Whether they hold floating or complex numbers, which have errors; integers are equal or not."""
        return bool(_kind(self.a))


def compare(a: Any, b: Any, *, channels: bool = False) -> Difference:
    """The difference of `b` from `a`; raises Incomparable.

    channels   every channel is held against its own largest value, so that small ones count as much as large
               ones. Where numbers cancel, rounding is a large part of what is left: `floating_error` tells
    """
    worst = Difference()
    for leaf in leaves(a, b):
        worst = worst.worse(leaf if isinstance(leaf, Difference) else _difference(leaf, channels))
    return worst


def floating_error(a: Any, b: Any, *, channels: bool = False) -> float | None:
    """The largest error of the floating leaves; None where there are none.

    For runs in a stored dtype: there rounding may turn an argmax or the length of a list, which says nothing
    of its size.
    """
    found = (_difference(leaf, channels) for leaf in leaves(a, b) if isinstance(leaf, Pair))
    return max((leaf.error for leaf in found if leaf.floating), default=None)


def leaves(a: Any, b: Any) -> Iterator[Pair | Difference]:
    """Every leaf of two outputs: two tensors, or how they differ besides numbers; raises Incomparable."""
    try:
        yield from _leaves(a, b, "output")
    except RecursionError:
        raise Incomparable("output holds itself, which cannot be compared") from None


def _leaves(a: Any, b: Any, at: str) -> Iterator[Pair | Difference]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        yield from _tensors(a, b, at)
    elif type(a) is not type(b):
        yield _unequal(at, f"{type(a).__name__} became {type(b).__name__}")
    elif dataclasses.is_dataclass(a) and not isinstance(a, Mapping):
        names = [field.name for field in dataclasses.fields(a)]
        for name in names:
            yield from _leaves(getattr(a, name, None), getattr(b, name, None), f"{at}.{name}")
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
        yield Pair(at, torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
    elif a is None or isinstance(a, _PLAIN):
        if a != b:
            yield _unequal(at, f"{a!r} became {b!r}")
    elif hasattr(a, "__array__"):
        yield from _tensors(torch.as_tensor(a), torch.as_tensor(b), at)
    elif getattr(a, "__dict__", None) and not isinstance(a, type):
        yield from _leaves(vars(a), vars(b), at)
    else:
        raise Incomparable(f"{at} is a {type(a).__name__}, which cannot be compared")


def _tensors(a: Tensor, b: Tensor, at: str) -> Iterator[Pair | Difference]:
    if a.is_nested or b.is_nested:
        yield from _nested(a, b, at)
    elif a.shape != b.shape:
        yield _unequal(at, f"shape {list(a.shape)} became {list(b.shape)}")
    elif _kind(a) != _kind(b):
        yield _unequal(at, f"{a.dtype} became {b.dtype}")
    else:
        yield Pair(at, _dense(a), _dense(b))


def _nested(a: Tensor, b: Tensor, at: str) -> Iterator[Pair | Difference]:
    """A nested tensor has no shape of its own: it is the tensors in it."""
    if a.is_nested != b.is_nested:
        before, after = ("a nested tensor" if tensor.is_nested else "a tensor" for tensor in (a, b))
        yield _unequal(at, f"{before} became {after}")
        return
    try:
        inner = list(a.unbind()), list(b.unbind())
    except Exception as error:  # a layout that torch does not take apart
        raise Incomparable(f"{at} is a nested tensor, which torch does not take apart: {error}") from error
    yield from _leaves(*inner, at)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _difference(pair: Pair, channels: bool) -> Difference:
    a, b, at = pair.a, pair.b, pair.at
    if not pair.numbers:
        unequal = int((a != b).sum())
        return _unequal(at, f"{unequal} of {a.numel()} integers differ") if unequal else Difference(0.0, at)
    wide = a.to(torch.promote_types(a.dtype, torch.float64))
    gap = float((wide - b).abs().max()) if a.numel() else 0.0
    return _numbers(wide, b, gap, at, channels) if math.isfinite(gap) else _not_finite(wide, b, at, channels)


def _numbers(a: Tensor, b: Tensor, gap: float, at: str, channels: bool) -> Difference:
    """Both hold finite numbers only, and `gap` is the largest between them."""
    if gap == 0.0:
        return Difference(0.0, at, floating=True)
    largest, other = float(a.abs().max()), float(b.abs().max())
    if largest > RESIDUE:
        return Difference(_relative(a, b, largest, channels), at, floating=True)
    if other <= RESIDUE:
        return Difference(0.0, at)
    return Difference(gap / largest if largest else math.inf, at, "zeros became other numbers")


def _relative(a: Tensor, b: Tensor, largest: float, channels: bool) -> float:
    """The largest max|a-b| / max|a|, of the whole or of each channel, over what is not equal in both; where
    that is small, it is what is left of the others."""
    gap, floor = (a - b).abs(), LEFT_OVER * min(largest, LARGE)
    size = a.abs().where(gap > 0, 0.0)
    if not channels or not a.ndim:
        return float(gap.max()) / max(float(size.max()), floor)
    ratios = [per_channel(gap, axis) / per_channel(size, axis).clamp(min=floor) for axis in channel_axes(a)]
    return max(float(ratio.max()) for ratio in ratios)


def channel_axes(tensor: Tensor) -> tuple[int, ...]:
    """The axes on which a tensor may have its channels: the last one, and of images the second too."""
    return (1, tensor.ndim - 1) if tensor.ndim > 2 else (tensor.ndim - 1,) if tensor.ndim else ()


def per_channel(values: Tensor, axis: int) -> Tensor:
    """The largest value of each channel on this axis."""
    return values.movedim(axis, 0).flatten(1).amax(1) if values.ndim > 1 else values


def _not_finite(a: Tensor, b: Tensor, at: str, channels: bool) -> Difference:
    if a.isnan().any() or b.isnan().any():
        return _with_nan(a, b, at, channels)
    finite = a.isfinite()
    if not torch.equal(a[~finite], b[~finite].to(a.dtype)) or not b[finite].isfinite().all():
        return Difference(math.inf, at, "infinities differ", floating=True)
    # Equal infinities are no difference, and what is equal has no part in any size.
    a, b = a.where(finite, 0.0), b.where(finite, 0.0)
    return _numbers(a, b, float((a - b).abs().max()), at, channels)


def _with_nan(a: Tensor, b: Tensor, at: str, channels: bool) -> Difference:
    """NaN in the original is no difference that anybody could judge; what is wrong beside it is one."""
    nan = Difference(math.inf, at, "NaN, which equals nothing", floating=True)
    undefined = a.isnan()
    if not undefined.any() or b[~undefined].isnan().any():
        return nan
    a, b = a.where(~undefined, 0.0), b.where(~undefined, 0.0)
    gap = float((a - b).abs().max())
    beside = _numbers(a, b, gap, at, channels) if math.isfinite(gap) else _not_finite(a, b, at, channels)
    return beside.worse(dataclasses.replace(nan, undefined=True))


def _kind(tensor: Tensor) -> str:
    """Twins differ in precision by intent; an integer that becomes a float is another matter."""
    return "floating" if tensor.is_floating_point() else "complex" if tensor.is_complex() else ""


def _unequal(at: str, why: str) -> Difference:
    return Difference(math.inf, at, why)
