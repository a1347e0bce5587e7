"""Layers in a row with nothing between them: one layer can stand for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fusecli.engine.decisions import Member
from fusecli.engine.routes import Routes
from fusecli.errors import NotFoldable
from fusecli.graph.kinds import LAYER_KINDS
from fusecli.graph.sites import Site


def rows(routes: Routes, sites_of: Callable[[Member], Sequence[Site]]) -> Iterator[tuple[Member, Member]]:
    """Every two layers of which the second alone reads what the first gives, each called once."""
    recording = routes.recording
    for visit in recording.visits:
        first = routes.audit.member(visit.path) if visit.path else None
        if first is None or not _usable(routes, first, sites_of) or len(visit.gives) != 1:
            continue
        value = visit.gives[0]
        while len(readers := recording.readers(value)) == 1:
            after = routes.taking(value, readers[0])
            if after is None or after[0].path not in routes.gone or after[1].exit is None:
                break
            value = after[1].exit
        inside = [recording.visits[number] for call in readers[:1] for number in call.visits]
        following = next((v for v in inside if v.takes == (value,) and v.path and v.plain), None)
        if len(readers) == 1 and following is not None:
            second = routes.audit.member(following.path)
            if _usable(routes, second, sites_of):
                yield first, second


def _usable(routes: Routes, layer: Member, sites_of: Callable[[Member], Sequence[Site]]) -> bool:
    if layer.kind not in LAYER_KINDS or not routes.may(layer.path):
        return False
    if len(routes.recording.visits_of(layer.path)) != 1:
        return False
    try:
        return len(sites_of(layer)) == 1
    except NotFoldable:
        return False
