"""Where the nodes of a graph stand: in layers from top to bottom, as in Sugiyama, Tagawa and Toda (1981).

An edge over several layers keeps a place in each, so that it runs beside the nodes and not through them; the
edges of one node share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

_SWEEPS = 9
_GAP = 24.0


@dataclass
class Layers:
    """The layout of one connected graph: `x` is the middle of each item. Items from `nodes` on are places
    that edges pass through.

    links  (upper item, lower item, the node that the edge comes from)
    """

    nodes: int
    widths: list[float]
    layers: list[list[int]]
    links: list[tuple[int, int, int]] = field(default_factory=list)
    x: list[float] = field(default_factory=list)

    @property
    def width(self) -> float:
        return max(x + width / 2 for x, width in zip(self.x, self.widths, strict=True))


def layered(widths: Sequence[float], edges: Sequence[tuple[int, int]]) -> Layers:
    """The layout of a connected graph. Each edge leads from a lower number to a higher one."""
    laid = _ranked(widths, edges)
    above: list[list[int]] = [[] for _ in laid.widths]
    below: list[list[int]] = [[] for _ in laid.widths]
    for upper, lower, _ in laid.links:
        above[lower].append(upper)
        below[upper].append(lower)
    for sweep in range(_SWEEPS):
        _order(laid.layers if sweep % 2 == 0 else laid.layers[::-1], above if sweep % 2 == 0 else below)
    laid.x = [0.0] * len(laid.widths)
    both = [[*up, *down] for up, down in zip(above, below, strict=True)]
    for sweep in range(_SWEEPS):
        # Downwards at last, so that a chain hangs straight.
        nearest = both if sweep == _SWEEPS - 2 else above if sweep % 2 == 0 else below
        for layer in laid.layers if sweep % 2 == 0 else laid.layers[::-1]:
            _place(laid, layer, nearest)
    left = min(x - width / 2 for x, width in zip(laid.x, laid.widths, strict=True))
    laid.x = [x - left for x in laid.x]
    return laid


def _ranked(widths: Sequence[float], edges: Sequence[tuple[int, int]]) -> Layers:
    """Each node below all that it reads from; what reads nothing just above its first reader."""
    rank = [0] * len(widths)
    for maker, reader in sorted(edges, key=lambda edge: edge[1]):
        rank[reader] = max(rank[reader], rank[maker] + 1)
    readers: list[list[int]] = [[] for _ in widths]
    for maker, reader in edges:
        readers[maker].append(reader)
    for source in set(range(len(widths))) - {reader for _, reader in edges}:
        rank[source] = min((rank[reader] - 1 for reader in readers[source]), default=0)
    laid = Layers(len(widths), list(widths), [[] for _ in range(max(rank) + 1)])
    for node in range(len(widths)):
        laid.layers[rank[node]].append(node)
    for node, found in enumerate(readers):
        _route(laid, node, sorted(found, key=rank.__getitem__), rank)
    return laid


def _route(laid: Layers, node: int, readers: Sequence[int], rank: Sequence[int]) -> None:
    at, level = node, rank[node]
    for reader in readers:
        while level + 1 < rank[reader]:
            level += 1
            passing = len(laid.widths)
            laid.widths.append(0.0)
            laid.layers[level].append(passing)
            laid.links.append((at, passing, node))
            at = passing
        laid.links.append((at, reader, node))


def _order(layers: Sequence[list[int]], towards: Sequence[Sequence[int]]) -> None:
    """Sorts each layer by the mean place of its neighbours in the layer before it."""
    place: dict[int, float] = {}
    for layer in layers:
        wanted = {
            item: fmean(place[other] for other in towards[item]) if towards[item] else (at + 0.5) / len(layer)
            for at, item in enumerate(layer)
        }
        layer.sort(key=wanted.__getitem__)
        place |= {item: (at + 0.5) / len(layer) for at, item in enumerate(layer)}


def _place(laid: Layers, layer: Sequence[int], towards: Sequence[Sequence[int]]) -> None:
    """Moves the items of a layer as near to the mean of their neighbours as their order and widths allow:
    least squares, by pooling adjacent violators."""
    offset, offsets = 0.0, []
    for before, item in zip([None, *layer], layer, strict=False):
        if before is not None:
            offset += (laid.widths[before] + laid.widths[item]) / 2 + _GAP
        offsets.append(offset)
    pools: list[tuple[float, int]] = []
    for item, start in zip(layer, offsets, strict=True):
        wanted = fmean(laid.x[other] for other in towards[item]) if towards[item] else laid.x[item]
        total, count = wanted - start, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            more, others = pools.pop()
            total, count = total + more, count + others
        pools.append((total, count))
    placed = [total / count for total, count in pools for _ in range(count)]
    for item, start, base in zip(layer, offsets, placed, strict=True):
        laid.x[item] = base + start
