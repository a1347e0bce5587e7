"""Layers in a row with nothing between them: one layer can stand for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fusecli.engine.audit import Audit
from fusecli.engine.decisions import Member
from fusecli.engine.routes import Routes
from fusecli.errors import NotFoldable
from fusecli.graph.dataflow import Call
from fusecli.graph.kinds import LAYER_KINDS, is_identity
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
            if after is not None and after[0].path in routes.gone and after[1].exit is not None:
                value = after[1].exit
            elif in_identity(routes.audit, readers[0]):
                value = readers[0].makes[0]
            else:
                break
        inside = [recording.visits[number] for call in readers[:1] for number in call.visits]
        taking = [v for v in inside if v.takes == (value,) and v.path and v.plain]
        following = (routes.audit.member(visit.path) for visit in taking)
        second = next((member for member in following if member.kind in LAYER_KINDS), None)
        if len(readers) == 1 and second is not None and _usable(routes, second, sites_of):
            yield first, second


def in_identity(audit: Audit, call: Call) -> bool:
    """Whether an op is what an nn.Identity does: it gives what it takes."""
    path = audit.recording.inside(call)
    return bool(path) and is_identity(audit.member(path).module)


def _usable(routes: Routes, layer: Member, sites_of: Callable[[Member], Sequence[Site]]) -> bool:
    if layer.kind not in LAYER_KINDS or not routes.may(layer.path):
        return False
    if len(routes.recording.visits_of(layer.path)) != 1:
        return False
    try:
        return len(sites_of(layer)) == 1
    except NotFoldable:
        return False
