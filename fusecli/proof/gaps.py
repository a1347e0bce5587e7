"""How far two outputs are apart in absolute numbers: leaf by leaf, and of each leaf channel by channel.

One number for a whole output is the largest one's: what is wrong in a small channel would be lost beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusecli.proof.compare import (
    LARGE,
    LEFT_OVER,
    RESIDUE,
    TOLERANCE,
    Difference,
    Pair,
    channel_axes,
    leaves,
    per_channel,
)

Place = tuple[str, int]  # the path of a leaf, and on which axis its channels are; -1: it is taken as a whole
_WHOLE = -1


@dataclass(frozen=True)
class Gaps:
    """How far an output is from another one.

    channels  the largest |a - b| of each channel; of integers how many differ
    numbers   the paths of the leaves that hold floating numbers
    broken    what differs in shape or structure, by path
    """

    channels: Mapping[Place, Tensor] = field(default_factory=dict)
    numbers: frozenset[str] = frozenset()
    broken: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def between(cls, a: Any, b: Any) -> Gaps:
        """Raises Incomparable."""
        channels: dict[Place, Tensor] = {}
        numbers, broken = set(), {}
        for leaf in leaves(a, b):
            if isinstance(leaf, Difference):
                broken[leaf.where] = leaf.why
            elif leaf.a.numel():
                numbers |= {leaf.at} if leaf.numbers else set()
                channels |= {(leaf.at, axis): gap for axis, gap in _of_axes(_gap(leaf), leaf)}
        return cls(channels, frozenset(numbers), broken)

    def of(self, place: Place, like: Tensor) -> Tensor:
        """The gaps of the channels at `place`; inf where a part of the structure that it is in differs."""
        if any(place[0].startswith(path) for path in self.broken):
            return torch.full_like(like, torch.inf)
        return self.channels.get(place, torch.full_like(like, torch.inf))


@dataclass(frozen=True)
class Line:
    """What the gaps of one leaf's channels are held against, all of them absolute.

    gap     of the fused output from the original's
    room    how much is a matter of rounding
    power   how far 1 % of error in the weights moves it
    size    what an error is told relative to: the largest value of the channel that is no constant
    """

    place: Place
    gap: Tensor
    room: Tensor
    power: Tensor
    size: Tensor

    @property
    def excess(self) -> float:
        """How many times the room the gap is, in the channel where that is the most."""
        return float(self._times.max())

    @property
    def notices(self) -> bool:
        """Whether 1 % of error in the weights is more than rounding, in the leaf as a whole."""
        return bool(self.power.max() > self.room.max())

    @property
    def acceptable(self) -> bool:
        """Whether a larger room would accept what is wrong, and 1 % of error in the weights still be seen."""
        wrong = self._times > 1
        finite = bool(self.gap[wrong].isfinite().all()) and bool(self.size.max())
        return finite and bool((self.power > self.gap)[wrong].all())

    @property
    def relative(self) -> tuple[float, float]:
        """The error and the tolerance of the channel that is nearest to being wrong."""
        worst = self._times.argmax()
        size = float(self.size[worst])
        if not size:
            return float(self.gap[worst]), TOLERANCE
        return float(self.gap[worst]) / size, max(TOLERANCE, float(self.room[worst]) / size)

    @property
    def _times(self) -> Tensor:
        """gap / room; 0 / 0 is nothing, and inf / inf is within the room."""
        times = (self.gap / self.room).nan_to_num(nan=1.0, posinf=torch.inf)
        return times.where(self.gap > 0, 0.0)


def lines(
    outputs: tuple[Any, Any, Any], difference: Gaps, rounding: Iterable[Gaps], power: Gaps, margin: float
) -> Iterator[Line]:
    """One line for each leaf and axis of its channels.

    outputs   of the original, of the fused model, and of that with weights that are off by 1 %
    rounding  of the fused model's from those with weights moved by half a unit in the last place
    margin    how many times the largest of those is still rounding
    """
    rounding = list(rounding)
    sizes = dict(_sizes(*outputs))
    for place, gap in difference.channels.items():
        noise = torch.stack([drawn.of(place, gap) for drawn in rounding]).amax(0) * margin
        shown = power.of(place, gap)
        if place not in sizes:  # integers are equal or not
            yield Line(place, gap, noise, shown, torch.zeros_like(gap))
            continue
        size, largest = sizes[place]
        # What depends on the weights is a hundred times what 1 % of them does: constants have no part in it.
        depends = torch.minimum(size, 100 * shown)
        room = torch.maximum(noise, TOLERANCE * depends).clamp(min=RESIDUE * largest)
        yield Line(place, gap, room, shown, size.clamp(min=LEFT_OVER * largest))


def _sizes(original: Any, fused: Any, off: Any) -> Iterator[tuple[Place, tuple[Tensor, float]]]:
    """Of each leaf the largest values of its channels and the largest of all, over what is not the same in
    all three outputs."""
    moved = {leaf.at: leaf for leaf in leaves(fused, off) if isinstance(leaf, Pair)}
    for leaf in leaves(original, fused):
        if isinstance(leaf, Difference) or not leaf.numbers or not leaf.a.numel():
            continue
        varies = leaf.a != leaf.b
        if leaf.at in moved and moved[leaf.at].b.shape == varies.shape:
            varies |= moved[leaf.at].a != moved[leaf.at].b
        size = leaf.a.abs().double().where(varies & leaf.a.isfinite(), 0.0)
        largest = min(float(size.max()), LARGE)
        for axis, sizes in _of_axes(size, leaf):
            yield (leaf.at, axis), (sizes, largest)


def _gap(leaf: Pair) -> Tensor:
    if not leaf.numbers:
        return (leaf.a != leaf.b).sum().double()
    wide = leaf.a.to(torch.promote_types(leaf.a.dtype, torch.float64))
    gap = (wide - leaf.b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return gap.where(leaf.a != leaf.b, 0.0)  # infinities may be equal


def _of_axes(values: Tensor, leaf: Pair) -> Iterator[tuple[int, Tensor]]:
    if not values.ndim or not leaf.numbers:
        yield _WHOLE, values.reshape(1)
        return
    for axis in channel_axes(values):
        yield axis, per_channel(values, axis)
