"""Where an affine map can go: through ops that commute with it, up to layers or down to them.

This is the only place that walks through such ops. It needs no rule for any of them: labels on channels are
run through the recorded ops and tell which channel of the map arrives at which channel of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusecli.engine.aliasing import Aliases
from fusecli.engine.decisions import Member
from fusecli.engine.maps import Map
from fusecli.engine.walks import Arrival, Downward, Terrain, Upward
from fusecli.errors import NotFoldable, require
from fusecli.graph.dataflow import Call, described
from fusecli.graph.labels import CONFLICT, NOWHERE, along, labels_at
from fusecli.graph.ops import MOVES, SELECTIONS
from fusecli.graph.sites import Site

Seeds = dict[int, Tensor | None]


@dataclass(frozen=True)
class Way:
    """How a map arrives at a layer, or at another map.

    channels  for each channel of the layer the channel of the map, or -1 where none arrives
    shifts    whether it brings the shift too: of the layers whose outputs are added, one takes it
    """

    target: Member
    channels: tuple[int, ...]
    shifts: bool


_Reached = tuple[Arrival, tuple[int, ...]]


class Routes(Terrain):
    """The routes of the maps in one run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        leaving = (found.path for found in self.maps if found.member.kind != "gain")
        self._aliases = Aliases(self.recording, leaving)

    def up(self, found: Map) -> list[Way]:
        """The layers whose outputs the map can be folded into, all of them; raises NotFoldable."""
        return self._walked(found, self._up)

    def down(self, found: Map) -> list[Way]:
        """The layers whose inputs the map can be folded into: every reader of what it gives."""
        return self._walked(found, self._down)

    def _walked(self, found: Map, walk: Callable[[Map, Site], list[_Reached]]) -> list[Way]:
        if found.member.kind != "gain":  # of a gain the module stays
            self._aliases.require_apart(found.path, self.gone.__contains__)
        try:
            return self._merged([walk(found, site) for site in found.sites])
        except RecursionError:
            reason = f"the way from {found.path} to a layer is too long to be followed"
            raise NotFoldable("no-linear-producer", reason) from None

    def _up(self, found: Map, site: Site) -> list[_Reached]:
        require(site.entry is not None, "no-linear-producer", "nothing goes into it that is not normalised")
        assert site.entry is not None
        walk = Upward(self, found)
        walk.go(site.entry, True)
        rank = len(self.recording.values[site.entry].shape)
        axis = found.axis % rank
        arrivals = []
        for arrival in walk.arrivals:
            seeds: Seeds = {other.value: None for other in walk.arrivals}
            seeds[arrival.value] = along(self.recording.values[arrival.value].shape, arrival.axis)
            labels = self._labels(site.entry, seeds, arrival.target.path, found.path)
            size = self.recording.values[arrival.value].shape[arrival.axis]
            channels = _where(labels, axis, size, arrival.target.path, found.path)
            self._require_sole(walk, arrival, seeds, channels, found)
            arrivals.append((arrival, channels))
        return arrivals

    def _down(self, found: Map, site: Site) -> list[_Reached]:
        assert site.exit is not None
        walk = Downward(self, found)
        walk.go(site.exit)
        shape = self.recording.values[site.exit].shape
        seeds: Seeds = dict.fromkeys(walk.beside)
        seeds[site.exit] = along(shape, found.axis % len(shape))
        arrivals = []
        for arrival in walk.arrivals:
            labels = self._labels(arrival.value, seeds, found.path, arrival.target.path)
            channels = _along(labels, arrival.axis, found.path, arrival.target.path)
            arrivals.append((arrival, tuple(-1 if c == NOWHERE else c for c in channels)))
        return arrivals

    def _labels(self, value: int, seeds: Seeds, source: str, target: str) -> Tensor:
        try:
            labels = labels_at(self.recording, value, seeds)
        except LookupError as op:
            raise NotFoldable(
                "bn-axis", f"the channels of {source} cannot be followed to {target}: {op}"
            ) from None
        require(labels is not None, "bn-axis", f"no channel of {source} arrives at {target}")
        assert labels is not None
        return labels

    def _require_sole(
        self, walk: Upward, arrival: Arrival, seeds: Seeds, channels: tuple[int, ...], found: Map
    ) -> None:
        """Guard: nobody else reads a channel that the fold changes."""
        changed = {channel for channel, of_map in enumerate(channels) if of_map >= 0}
        waiting, seen = [arrival.value], {arrival.value}
        while waiting:
            value = waiting.pop()
            for call in self.recording.readers(value):
                if call.number in walk.ends:
                    continue
                if call.number in walk.crossed or (call.name in MOVES | SELECTIONS and call.op is not None):
                    fresh = [made for made in call.makes if made not in seen]
                    seen.update(fresh)
                    waiting += fresh
                    continue
                if (gone := self._gone_after(value, call)) is not None:
                    waiting += [] if gone in seen else [gone]
                    seen.add(gone)
                    continue
                labels = self._labels(value, seeds, arrival.target.path, found.path)
                present = set(labels.unique().tolist())
                if changed & present or CONFLICT in present:
                    raise NotFoldable(
                        "multiple-consumers",
                        f"{found.path} is not the only one to read what {arrival.target.path} gives",
                        evidence=described(self.recording, [call]),
                        remedy="leave it: the other readers would see folded values",
                    )

    def _gone_after(self, value: int, call: Call) -> int | None:
        """What a folded map gives of `value`, if that is what `call` belongs to."""
        found = self.taking(value, call)
        return found[1].exit if found is not None and found[0].path in self.gone else None

    def _merged(self, found: Sequence[Sequence[_Reached]]) -> list[Way]:
        """One way for each layer: the same in all of its calls, and in each of them."""
        members: dict[str, Member] = {}
        ways: dict[str, set[tuple[tuple[int, ...], bool]]] = {}
        visits: dict[str, list[int]] = {}
        for arrival, channels in (pair for arrivals in found for pair in arrivals):
            path = arrival.target.path
            members[path] = arrival.target
            ways.setdefault(path, set()).add((channels, arrival.shifts))
            visits.setdefault(path, []).append(arrival.visit)
        result = []
        for path, target in members.items():
            once_each = sorted(visits[path]) == list(range(len(self.recording.visits_of(path))))
            require(
                once_each and len(ways[path]) == 1,
                "shared-module",
                f"{path} is also called where the map is not, or not with the same channels",
                remedy="give each place its own module, or say `shared: clone` in the spec",
            )
            ((channels, shifts),) = ways[path]
            result.append(Way(target, channels, shifts))
        return result


def _along(labels: Tensor, axis: int, source: str, target: str) -> list[int]:
    """The label of each entry along `axis`, which has to be the same wherever else one looks."""
    rows = labels.movedim(axis, 0).flatten(1)
    same = rows.shape[1] > 0 and bool((rows == rows[:, :1]).all()) and not bool((rows == CONFLICT).any())
    require(
        same,
        "bn-axis",
        f"the channels of {source} do not arrive at {target} as channels",
        remedy="leave it: this map is no function of the layer's channels",
    )
    found: list[int] = rows[:, 0].tolist()
    return found


def _where(labels: Tensor, axis: int, size: int, source: str, target: str) -> tuple[int, ...]:
    """For each of `size` channels of a layer the channel of the map that it arrives at, or -1: all of it has
    to arrive at one. Several may arrive at the same, as pixels that are shuffled do."""
    rows = labels.movedim(axis, 0).flatten(1)
    thin = rows[:, :1] if rows.shape[1] and bool((rows == rows[:, :1]).all()) else rows
    pairs = (thin.long() * len(rows) + torch.arange(len(rows))[:, None])[thin >= 0].unique()
    arriving = pairs // len(rows)
    once = len(arriving.unique()) == len(arriving) and not bool((thin == CONFLICT).any())
    require(
        once,
        "bn-axis",
        f"the channels of {source} do not arrive at {target} as channels",
        remedy="leave it: this map is no function of the layer's channels",
    )
    channels = torch.full((size,), -1)
    channels[arriving] = pairs % len(rows)
    return tuple(channels.tolist())
