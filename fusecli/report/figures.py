"""Numbers as people read them: short, always in the same form, and never rounded to a nicer verdict."""

from __future__ import annotations

import math

_UNITS = ("bytes", "kB", "MB", "GB", "TB")
ABSENT = "–"


def scientific(value: float | None) -> str:
    """3.1e-16; 0 when exactly zero, a dash when nothing was measured."""
    if value is None:
        return ABSENT
    return "0" if value == 0 else f"{value:.1e}"


def times(ratio: float | None) -> str:
    """1.1×; scientific above 1000, where digits before the point say nothing."""
    if ratio is None:
        return ABSENT
    return f"{ratio:.1f}×" if ratio < 1000 else f"{ratio:.0e}×" if math.isfinite(ratio) else f"{ratio}×"


def size(count: int | None) -> str:
    """101.9 MB: decimal units, as file managers and registries count."""
    if count is None:
        return "size unknown"
    amount = float(count)
    for unit in _UNITS:
        if amount < 1000 or unit == _UNITS[-1]:
            break
        amount /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"


def whole(count: int | None) -> str:
    return ABSENT if count is None else f"{count:,}"


def difference(before: int | None, after: int | None) -> str:
    """-212,480 (-0.2 %), or "same"."""
    if before is None or after is None:
        return ""
    change = after - before
    if change == 0:
        return "same"
    share = f" ({100 * change / before:+.1f} %)" if before else ""
    return f"{change:+,}{share}"


def counted(count: int, noun: str) -> str:
    """1 group, 3 groups."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
