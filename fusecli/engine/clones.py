"""Layers that are called several times, each time with a norm of its own behind them."""

from __future__ import annotations

from collections.abc import Sequence

from fusecli.engine.decisions import Member
from fusecli.engine.maps import Map
from fusecli.engine.routes import Routes
from fusecli.errors import require
from fusecli.graph.ops import LAYERS
from fusecli.graph.sites import Site


def clones(routes: Routes, layer: Member, sites: Sequence[Site]) -> list[tuple[Map, tuple[int, ...]]]:
    """The norms behind the calls of a layer, each with its channels, if there are several and nothing else.

    Raises NotFoldable where a call has something else behind it.
    """
    recording = routes.recording
    found: dict[str, tuple[Map, tuple[int, ...]]] = {}
    for site in sites:
        assert site.exit is not None
        (number,) = site.calls
        readers = recording.readers(site.exit)
        behind = routes.taking(site.exit, readers[0]) if readers else None
        shape = recording.values[site.exit].shape
        axis = LAYERS[recording.calls[number].name][1] % len(shape)
        own = (
            behind is not None
            and behind[0].path not in routes.gone
            and behind[0].member.kind == "norm"
            and behind[0].axis % len(shape) == axis
            and all(call.number in behind[1].calls for call in readers)
            and routes.may(behind[0].path)
        )
        require(own, "shared-module", f"a call of {layer.path} has no norm of its own behind it")
        assert behind is not None
        found[behind[0].path] = (behind[0], tuple(range(shape[axis])))
    exits = {site.exit for site in sites}
    only = all(site.entry in exits for norm, _ in found.values() for site in norm.sites)
    require(only, "shared-module", f"a norm behind {layer.path} has another layer before it too")
    return list(found.values()) if len(found) > 1 else []
