"""Where a module is at work in a recording: the ops that apply its weight, the calls that normalise.

A layer is found by its parameters, not by who called whom: a weight that is used functionally, or by another
module that is tied to it, shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from fusecli.graph.dataflow import Call, Recording, Value, Visit
from fusecli.graph.labels import along
from fusecli.graph.ops import LAYERS, MOVES, NORMS, SUMS


@dataclass(frozen=True)
class Site:
    """One time that a module did its work.

    visit   which call of the module it was, counted from 0
    calls   the op calls that do it
    entry   the value that comes in; None: none, or several
    exit    the value that goes out
    """

    path: str
    visit: int
    calls: frozenset[int]
    entry: int | None
    exit: int | None


def reads_through(recording: Recording, value: int) -> Iterator[tuple[Call, int]]:
    """Every call that reads `value` or what was only moved from it, and the value it reads."""
    for call in recording.readers(value):
        if call.name in MOVES and call.op is not None:
            for moved in call.makes:
                yield from reads_through(recording, moved)
        else:
            yield call, value


def moved_from(recording: Recording, value: int) -> int:
    """The value that `value` is only a view or a copy of."""
    while (call := recording.maker(value)) is not None and call.name in MOVES:
        value = call.reads[0]
    return value


def weight_of(call: Call) -> int | None:
    """The value that stands where a layer's op has its weight."""
    return call.argument(LAYERS[call.name][0]) if call.name in LAYERS else None


def visit_of(recording: Recording, call: Call, path: str) -> int | None:
    """Which call of the module at `path` an op call ran in, counted from 0; None if in none."""
    first = recording.first_name.get(path, path)
    return next((recording.turns[n] for n in call.visits if recording.visits[n].path == first), None)


def layer_sites(recording: Recording, path: str) -> list[Site]:
    """The ops in the layer's own forward that apply its weight, or what is computed from it and its other
    tensors alone, such as a mask."""
    names = _names(recording, path)
    weights = {f"{name}.weight" for name in names}
    prefixes = tuple(f"{name}." for name in names)
    sites = []
    for number, visit in enumerate(recording.visits_of(path)):
        for call in recording.living(recording.calls[i] for i in visit.calls):
            weight = weight_of(call)
            origins = recording.values[weight].origins if weight is not None else frozenset()
            if origins & weights and all(origin.startswith(prefixes) for origin in origins):
                entry = _only(tuple(v for v in call.reads if not recording.values[v].constant))
                sites.append(Site(path, number, frozenset([call.number]), entry, call.makes[0]))
    return sites


def strangers(recording: Recording, path: str) -> list[Call]:
    """Op calls outside of the module's own forward that read its parameters or buffers."""
    return [
        call
        for value in recording.tensors_of(path)
        for call, _ in reads_through(recording, value.number)
        if visit_of(recording, call, path) is None
    ]


def _names(recording: Recording, path: str) -> tuple[str, ...]:
    """Every name of the module at `path`."""
    return recording.names.get(recording.first_name.get(path, path), (path,))


def module_sites(recording: Recording, path: str) -> list[Site]:
    """The sites of a module as its calls show them."""
    return [
        Site(path, number, frozenset(visit.calls), _only(visit.takes), _only(visit.gives))
        for number, visit in enumerate(recording.visits_of(path))
    ]


def _only(values: tuple[int, ...]) -> int | None:
    return values[0] if len(values) == 1 else None


def foreign(recording: Recording, visit: Visit, call: Call) -> set[int]:
    """What an op in a module call reads besides the module's own tensors and literals."""
    own = tuple(f"{name}." for name in _names(recording, visit.path))

    def derived(value: Value) -> bool:
        return value.constant and all(origin.startswith(own) for origin in value.origins)

    return {value for value in call.reads if not derived(recording.values[value])}


def flowing(recording: Recording, visit: Visit) -> list[Call]:
    """The op calls of a module call that read something that is not its own, those of its submodules left
    out."""
    return recording.living(
        call
        for call in (recording.calls[number] for number in visit.calls)
        if call.op is not None
        and call.visits[-1] == visit.number
        and (call.name in NORMS or foreign(recording, visit, call))
    )


def applied_as_weight(recording: Recording, value: int) -> bool:
    """Whether a layer applies `value`, or what is computed from it and other constants, as its weight."""
    waiting, seen = [value], {value}
    while waiting:
        current = waiting.pop()
        for call in recording.readers(current):
            if weight_of(call) == current:
                return True
            found = [v for v in call.makes if v not in seen and recording.values[v].constant]
            seen.update(found)
            waiting += found
    return False


def next_step(recording: Recording, value: int, layer: str) -> int | None:
    """Where `value` goes if nothing happens to it but a move, or the layer's own bias is added; else None."""
    readers = recording.readers(value)
    if len(readers) != 1 or readers[0].op is None or len(readers[0].makes) != 1:
        return None
    (call,) = readers
    if call.name in MOVES and recording.values[call.makes[0]].dtype.is_floating_point:
        return call.makes[0]
    if call.name in SUMS and any(adds_bias(recording, call, read, layer) for read in call.reads):
        return call.makes[0]
    return None


def adds_bias(recording: Recording, call: Call, value: int, layer: str) -> bool:
    """Whether `value`, read by `call`, is the layer's bias."""
    name = recording.values[moved_from(recording, value)].name
    return name in {f"{own}.bias" for own in _names(recording, layer)}


def channel_seeds(
    recording: Recording, site: Site, tensors: Mapping[str, tuple[int, ...]]
) -> dict[int, Tensor]:
    """Labels on the output channels of a layer's site, and the same on vectors by name: those of the norm,
    and the layer's bias."""
    assert site.exit is not None
    (number,) = site.calls
    axis = LAYERS[recording.calls[number].name][1]
    seeds = {site.exit: along(recording.values[site.exit].shape, axis)}
    for name, shape in tensors.items():
        vector = recording.named(name)
        if vector is not None and len(shape) == 1:
            seeds[vector.number] = along(shape, 0)
    return seeds
