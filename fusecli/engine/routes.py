"""Where an affine map can go: through ops that commute with it, up to layers or down to them.

This is the only place that walks through such ops. It needs no rule for any of them: labels on channels are
run through the recorded ops and tell which channel of the map arrives at which channel of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusecli.engine.audit import Audit
from fusecli.engine.decisions import Member
from fusecli.engine.maps import Map
from fusecli.errors import NotFoldable, require
from fusecli.graph.dataflow import Call, described
from fusecli.graph.kinds import LAYER_KINDS
from fusecli.graph.labels import CONFLICT, NOWHERE, along, labels_at
from fusecli.graph.ops import AVERAGES, JOINS, LAYERS, MOVES, SELECTIONS, SUMS
from fusecli.graph.sites import Site, adds_bias, reads_through, weight_of

# A per-channel affine map on what goes in is the same map on what comes out, as far as the labels tell.
COMMUTING = MOVES | SELECTIONS | JOINS | AVERAGES
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


@dataclass(frozen=True)
class _Arrival:
    """One call of a layer that a walk has come to: `value` is what it gives (up) or takes (down)."""

    target: Member
    visit: int
    value: int
    axis: int
    shifts: bool


_Reached = tuple[_Arrival, tuple[int, ...]]


@dataclass
class Routes:
    """The routes of the maps in one run.

    maps   every map, by the value that it gives
    gone   the maps that have been folded: what they gave is what they took
    may    whether a layer may be changed
    """

    audit: Audit
    maps: Sequence[Map]
    may: Callable[[str], bool]
    layer: Callable[[Member], Sequence[Site]]
    gone: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.recording = self.audit.recording
        self._giving = {site.exit: (found, site) for found in self.maps for site in found.sites}
        self._taking: dict[int | None, list[tuple[Map, Site]]] = {}
        for found in self.maps:
            for site in found.sites:
                self._taking.setdefault(site.entry, []).append((found, site))

    def giving(self, value: int | None) -> tuple[Map, Site] | None:
        """The map that gives `value`, and where."""
        return self._giving.get(value)

    def taking(self, value: int, call: Call) -> tuple[Map, Site] | None:
        """The map that takes `value`, and where, if that is what `call` belongs to."""
        takers = self._taking.get(value, ())
        return next(((found, site) for found, site in takers if call.number in site.calls), None)

    def up(self, found: Map) -> list[Way]:
        """The layers whose outputs the map can be folded into, all of them; raises NotFoldable."""
        return self._walked(found, self._up)

    def down(self, found: Map) -> list[Way]:
        """The layers whose inputs the map can be folded into: every reader of what it gives."""
        return self._walked(found, self._down)

    def _walked(self, found: Map, walk: Callable[[Map, Site], list[_Reached]]) -> list[Way]:
        for site in found.sites:
            self._require_unwritten(found, site)
        try:
            return self._merged([walk(found, site) for site in found.sites])
        except RecursionError:
            reason = f"the way from {found.path} to a layer is too long to be followed"
            raise NotFoldable("no-linear-producer", reason) from None

    def keeps_dtype(self, call: Call) -> bool:
        """Whether an op gives the dtype that it takes: a cast rounds or overflows where the map has not
        been."""
        values = [self.recording.values[value] for value in (*call.reads, *call.makes)]
        return len({value.dtype for value in values if not value.constant}) == 1

    def _require_unwritten(self, found: Map, site: Site) -> None:
        """Guard: nobody writes to what the map takes; once it is gone, what it gives is that memory."""
        if site.entry is None:
            return
        readers = (call for call, _ in reads_through(self.recording, site.entry))
        writers = [call for call in readers if call.writes and call.number not in site.calls]
        require(
            not writers,
            "multiple-consumers",
            f"what {found.path} takes is written to in place, and would be what it gives",
            evidence=described(self.recording, writers),
        )

    def _up(self, found: Map, site: Site) -> list[_Reached]:
        require(site.entry is not None, "no-linear-producer", "nothing goes into it that is not normalised")
        assert site.entry is not None
        walk = _Upward(self, found)
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
        walk = _Downward(self, found)
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
        self, walk: _Upward, arrival: _Arrival, seeds: Seeds, channels: tuple[int, ...], found: Map
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


@dataclass
class _Upward:
    """From what a map takes up to the layers that give it."""

    routes: Routes
    found: Map
    arrivals: list[_Arrival] = field(default_factory=list)
    crossed: set[int] = field(default_factory=set)
    ends: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        # The map itself, and what else is done in its module: they read what the fold changes, as they
        # should.
        self.ends = {number for site in self.found.sites for number in site.calls}

    def go(self, value: int, shifts: bool) -> None:
        routes, recording = self.routes, self.routes.recording
        giver = routes.giving(value)
        if giver is not None and giver[0].path != self.found.path:
            if giver[0].path not in routes.gone:
                self._arrive_at_map(giver[0], giver[1], shifts)
                return
            if giver[1].entry is not None:
                self.go(giver[1].entry, shifts)
                return
        call = recording.maker(value)
        layer = self._layer(call, value)
        if call is None:
            raise self._none(value)
        if layer is not None:
            self._arrive_at_layer(layer, call, value, shifts)
            return
        flowing = [read for read in call.reads if not recording.values[read].constant]
        # What is joined with a constant is scaled there too, and no layer can take that over.
        whole = call.name not in JOINS or len(flowing) == len(call.reads)
        if call.name in COMMUTING and flowing and whole and routes.keeps_dtype(call):
            self.crossed.add(call.number)
            for read in dict.fromkeys(flowing):
                self.go(read, shifts)
        elif call.name in SUMS and len(flowing) == 1 and self._is_own_bias(call, flowing[0]):
            self.crossed.add(call.number)
            self.go(flowing[0], shifts)
        elif call.name in SUMS and len(set(flowing)) == 2 and call.kwargs.get("alpha", 1) == 1:
            self.crossed.add(call.number)
            self.go(flowing[0], shifts)
            self.go(flowing[1], False)
        else:
            raise self._none(value)

    def _layer(self, call: Call | None, value: int) -> Member | None:
        """The layer that gives `value`, or applies its weight there."""
        owner = None if call is None else owner_of(self.routes.audit, call)
        return None if owner is None else self.routes.audit.member(owner)

    def _is_own_bias(self, call: Call, value: int) -> bool:
        maker = self.routes.recording.maker(value)
        while maker is not None and maker.name in MOVES:
            maker = self.routes.recording.maker(maker.reads[0])
        layer = self._layer(maker, value)
        return layer is not None and any(
            adds_bias(self.routes.recording, call, read, layer.path) for read in call.reads
        )

    def _arrive_at_layer(self, layer: Member, call: Call, value: int, shifts: bool) -> None:
        self._require_may(layer.path)
        for site in self.routes.layer(layer):
            if call.number in site.calls:
                axis = LAYERS[call.name][1] % len(self.routes.recording.values[value].shape)
                self.arrivals.append(_Arrival(layer, site.visit, value, axis, shifts))
                return
        raise self._none(value)

    def _arrive_at_map(self, before: Map, site: Site, shifts: bool) -> None:
        self._require_may(before.path)
        assert site.exit is not None
        axis = before.axis % len(self.routes.recording.values[site.exit].shape)
        self.arrivals.append(_Arrival(before.member, site.visit, site.exit, axis, shifts))

    def _require_may(self, path: str) -> None:
        require(
            self.routes.may(path),
            "multiple-consumers",
            f"{path}, which feeds it, is in another group or excluded",
        )

    def _none(self, value: int) -> NotFoldable:
        source = self.routes.audit.source(value)
        return NotFoldable(
            "no-linear-producer",
            f"what feeds it is no layer that it could be folded into: {source}",
            evidence=(f"{self.found.path} reads what comes from {source}",),
        )


@dataclass
class _Downward:
    """From what a map gives down to the layers that take it; `beside` is what joins the way, unchanged."""

    routes: Routes
    found: Map
    arrivals: list[_Arrival] = field(default_factory=list)
    beside: set[int] = field(default_factory=set)
    _seen: set[int] = field(default_factory=set)

    def go(self, value: int) -> None:
        if value in self._seen:
            return
        self._seen.add(value)
        self.beside.discard(value)
        readers = self.routes.recording.readers(value)
        require(bool(readers), "not-executed", f"nobody reads what {self.found.path} gives")
        for call in readers:
            if (taker := self.routes.taking(value, call)) is not None:
                self._enter_map(*taker)
            elif (layer := self._layer(value, call)) is not None:
                self._arrive(*layer, value)
            elif call.name in COMMUTING and call.op is not None and self.routes.keeps_dtype(call):
                self.beside.update(read for read in call.reads if read not in self._seen)
                for made in call.makes:
                    self.go(made)
            else:
                raise NotFoldable(
                    "multiple-consumers" if len(readers) > 1 else "no-linear-consumer",
                    f"what {self.found.path} gives is read by something that cannot take it over",
                    evidence=described(self.routes.recording, [call]),
                )

    def _enter_map(self, after: Map, site: Site) -> None:
        assert site.exit is not None
        assert site.entry is not None
        if after.path in self.routes.gone:
            self.go(site.exit)
            return
        self._require_may(after.path)
        rank = len(self.routes.recording.values[site.entry].shape)
        self.arrivals.append(_Arrival(after.member, site.visit, site.entry, after.axis % rank, True))

    def _layer(self, value: int, call: Call) -> tuple[Member, int] | None:
        """The layer whose call reads `value` as its input, and which call that is."""
        recording = self.routes.recording
        for number in call.visits:
            visit = recording.visits[number]
            member = self.routes.audit.member(visit.path) if visit.path else None
            if member is not None and member.kind in LAYER_KINDS and visit.takes[:1] == (value,):
                return member, recording.turns[number]
        return None

    def _arrive(self, layer: Member, visit: int, value: int) -> None:
        self._require_may(layer.path)
        self.routes.layer(layer)  # it applies its weight once in each call, to nothing else
        if any(a.target.path == layer.path and a.visit == visit for a in self.arrivals):
            return
        rank = len(self.routes.recording.values[value].shape)
        axis = rank - 1 if layer.kind == "linear" else rank - 1 - _spatial(layer)
        self.arrivals.append(_Arrival(layer, visit, value, axis, True))

    def _require_may(self, path: str) -> None:
        require(self.routes.may(path), "multiple-consumers", f"{path}, which reads it, may not be changed")


def owner_of(audit: Audit, call: Call) -> str | None:
    """The layer whose own weight an op applies; None where it is no layer's."""
    weight = weight_of(call)
    if weight is None:
        return None
    owners = {name.rpartition(".")[0] for name in audit.recording.values[weight].origins}
    known = [path for path in owners if path and audit.member(path).kind in LAYER_KINDS]
    if len(owners) == 1 and known:
        return known[0]
    return None


def _spatial(layer: Member) -> int:
    weight = layer.module._parameters.get("weight")
    return 0 if weight is None else weight.ndim - 2


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
