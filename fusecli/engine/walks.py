"""The two walks of an affine map through ops that commute with it: up to layers, and down to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fusecli.engine.audit import Audit
from fusecli.engine.decisions import Member
from fusecli.engine.maps import Map
from fusecli.errors import NotFoldable, require
from fusecli.graph.dataflow import Call, described
from fusecli.graph.kinds import LAYER_KINDS, is_exact
from fusecli.graph.ops import AVERAGES, JOINS, LAYERS, MOVES, SELECTIONS, SUMS
from fusecli.graph.sites import Site, adds_bias, weight_of

# A per-channel affine map on what goes in is the same map on what comes out, as far as the labels tell.
COMMUTING = MOVES | SELECTIONS | JOINS | AVERAGES


@dataclass(frozen=True)
class Arrival:
    """One call of a layer that a walk has come to: `value` is what it gives (up) or takes (down)."""

    target: Member
    visit: int
    value: int
    axis: int
    shifts: bool


@dataclass
class Terrain:
    """What the walks go through: one run, with its maps.

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

    def keeps_range(self, call: Call) -> bool:
        """Whether an op gives floating-point numbers that can be as large as those it takes: what the map
        would have scaled down first might overflow in a cast. What a cast rounds is left to the proof."""
        values = self.recording.values
        flowing = [values[value].dtype for value in call.reads if not values[value].constant]
        given = [values[value].dtype for value in call.makes]
        if not all(dtype.is_floating_point for dtype in (*flowing, *given)):
            return False
        # bfloat16 ends where float32 does, but for its shorter mantissa.
        return all(2 * torch.finfo(b).max > torch.finfo(a).max for a in flowing for b in given)


@dataclass
class Upward:
    """From what a map takes up to the layers that give it."""

    routes: Terrain
    found: Map
    arrivals: list[Arrival] = field(default_factory=list)
    crossed: set[int] = field(default_factory=set)
    ends: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        # The map itself, and what else is done in its module: they read what the fold changes, as they
        # should.
        self.ends = {number for site in self.found.sites for number in site.calls}

    def go(self, value: int, shifts: bool) -> None:
        routes, recording = self.routes, self.routes.recording
        routes.audit.require_unpadded(value)
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
        if call.name in COMMUTING and flowing and whole and routes.keeps_range(call):
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
                self.arrivals.append(Arrival(layer, site.visit, value, axis, shifts))
                return
        raise self._none(value)

    def _arrive_at_map(self, before: Map, site: Site, shifts: bool) -> None:
        self._require_may(before.path)
        assert site.exit is not None
        axis = before.axis % len(self.routes.recording.values[site.exit].shape)
        self.arrivals.append(Arrival(before.member, site.visit, site.exit, axis, shifts))

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
class Downward:
    """From what a map gives down to the layers that take it; `beside` is what joins the way, unchanged."""

    routes: Terrain
    found: Map
    arrivals: list[Arrival] = field(default_factory=list)
    beside: set[int] = field(default_factory=set)
    _seen: set[int] = field(default_factory=set)

    def go(self, value: int) -> None:
        if value in self._seen:
            return
        self._seen.add(value)
        self.beside.discard(value)
        self.routes.audit.require_unpadded(value)
        readers = self.routes.recording.readers(value)
        require(bool(readers), "not-executed", f"nobody reads what {self.found.path} gives")
        for call in readers:
            if (taker := self.routes.taking(value, call)) is not None:
                self._enter_map(*taker)
            elif (layer := self._layer(value, call)) is not None:
                self._arrive(*layer, value)
            elif call.name in COMMUTING and call.op is not None and self.routes.keeps_range(call):
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
        self.arrivals.append(Arrival(after.member, site.visit, site.entry, after.axis % rank, True))

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
        # It applies its weight once in each call, to nothing else.
        for site in self.routes.layer(layer):
            if site.visit == visit:
                self._require_applied(layer, site, value)
        if any(a.target.path == layer.path and a.visit == visit for a in self.arrivals):
            return
        rank = len(self.routes.recording.values[value].shape)
        axis = rank - 1 if layer.kind == "linear" else rank - 1 - _spatial(layer)
        self.arrivals.append(Arrival(layer, visit, value, axis, True))

    def _require_applied(self, layer: Member, site: Site, value: int) -> None:
        """Guard for a class that nobody has read: it applies its weight to what it takes, moved at most. What
        torch's own classes do before that, the rules know from their attributes."""
        recording, applied = self.routes.recording, site.entry
        if is_exact(layer.module) or applied is None:
            return
        while applied != value:
            call = recording.maker(applied)
            require(
                call is not None and self._moves(call),
                "not-linear-in-weight",
                f"{layer.path} does not apply its weight to what {self.found.path} gives, but to more",
                evidence=(recording.described(call) if call is not None else "it takes something else",),
            )
            assert call is not None
            applied = call.reads[0]

    def _moves(self, call: Call) -> bool:
        """Whether the op only moves elements; to pad by nothing, at this size, is no more than that."""
        values = self.routes.recording.values
        if call.name == "aten.constant_pad_nd":
            return values[call.reads[0]].shape == values[call.makes[0]].shape
        return call.name in MOVES | SELECTIONS

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
