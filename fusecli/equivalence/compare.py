"""Two outputs of one model, compared leaf by leaf, whatever they are nested in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-9  # right folds stay below 6e-12 in float64, wrong ones start at 4e-5: the line is between


class Incomparable(Exception):
    """The outputs hold something whose equality nobody can judge."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """error: the largest max|a-b| / max|a| of all floating leaves; inf where structure, ints or NaNs differ.

    `where` is the path of the worst leaf, `why` says what is wrong where it is no matter of numbers.
    """

    error: float = 0.0
    where: str = ""
    why: str = ""

    def worse(self, other: Difference) -> Difference:
        return other if other.error > self.error or (other.why and not self.why) else self


def compare(a: Any, b: Any) -> Difference:
    """The difference of `b` from `a`; raises Incomparable."""
    worst = Difference()
    for difference in _leaves(a, b, "output"):
        worst = worst.worse(difference)
    return worst


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
        yield _tensors(torch.tensor(a), torch.tensor(b), at)
    elif a is None or isinstance(a, bool | int | str | bytes):
        if a != b:
            yield _unequal(at, f"{a!r} became {b!r}")
    elif hasattr(a, "__dict__"):
        yield from _leaves(vars(a), vars(b), at)
    else:
        raise Incomparable(f"{at} is a {type(a).__name__}, which cannot be compared")


def _tensors(a: Tensor, b: Tensor, at: str) -> Difference:
    if a.shape != b.shape:
        return _unequal(at, f"shape {list(a.shape)} became {list(b.shape)}")
    if not (a.is_floating_point() or a.is_complex()):
        unequal = int((a != b).sum())
        return _unequal(at, f"{unequal} of {a.numel()} integers differ") if unequal else Difference(0.0, at)
    if a.isnan().any() or b.isnan().any():
        return _unequal(at, "NaN, which equals nothing")
    finite = a.isfinite()
    if not torch.equal(a[~finite], b[~finite].to(a.dtype)):
        return _unequal(at, "infinities differ")
    a, b = a[finite].to(torch.promote_types(a.dtype, torch.float64)), b[finite]
    if a.numel() == 0:
        return Difference(0.0, at)
    largest, gap = float(a.abs().max()), float((a - b).abs().max())
    if gap == 0.0:
        return Difference(0.0, at)
    error = gap / largest if largest else math.inf
    return Difference(error, at, "" if math.isfinite(error) else "zeros became other numbers or infinities")


def _unequal(at: str, why: str) -> Difference:
    return Difference(math.inf, at, why)
