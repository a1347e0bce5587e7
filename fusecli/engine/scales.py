"""Finding the affine maps that are no norms: ops that scale and shift by tensors of their own module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from fusecli.engine.decisions import Member
from fusecli.engine.inside import untouched
from fusecli.engine.maps import Map
from fusecli.errors import NotFoldable, require
from fusecli.graph.dataflow import Call, Recording, Ref, Visit
from fusecli.graph.kinds import FOLDABLE
from fusecli.graph.ops import AFFINE, GAINS, MOVES
from fusecli.graph.sites import Site


def scales_and_gains(recording: Recording, member_of: Callable[[str], Member]) -> Iterator[Map]:
    """Every affine map in the run that is made of a module's own tensors, norms and layers left out."""
    found: dict[str, list[tuple[Visit, tuple[Call, ...]]]] = {}
    for chain in _chains(recording):
        visit = recording.visits[chain[0].visits[-1]]
        found.setdefault(visit.path, []).append((visit, chain))
    for path, places in found.items():
        # The bias that a layer adds is its own: a linear layer may do so in an op after the product.
        if not path or member_of(path).kind in FOLDABLE:
            continue
        try:
            yield _scale_or_gain(recording, member_of(path), places)
        except NotFoldable:
            continue


def _chains(recording: Recording) -> Iterator[tuple[Call, ...]]:
    """Ops in a row that scale and shift one tensor by tensors of the module they run in."""
    taken: set[int] = set()
    for call in recording.calls:
        if call.number in taken or not recording.alive[call.number]:
            continue
        chain: list[Call] = []
        following: Call | None = call
        while following is not None and _own_affine(recording, following, call):
            chain.append(following)
            if following.name in GAINS:
                break
            following = _after(recording, following)
        if any(_constants(recording, step) for step in chain):
            taken.update(step.number for step in chain)
            yield tuple(chain)


def _after(recording: Recording, call: Call) -> Call | None:
    readers = recording.readers(call.makes[0]) if len(call.makes) == 1 else []
    return readers[0] if len(readers) == 1 and readers[0].visits == call.visits else None


def _own_affine(recording: Recording, call: Call, first: Call) -> bool:
    """Whether an op is affine in one tensor, by tensors of the module that it runs in and by literals."""
    if not call.visits or call.visits != first.visits:
        return False
    path = recording.visits[call.visits[-1]].path
    own = {f"{name}." for name in recording.names.get(path, (path,))}
    flowing = [read for read in call.reads if not recording.values[read].constant]
    origins = {
        o for read in call.reads for o in recording.values[read].origins if recording.values[read].constant
    }
    held = all(_can_be_made(recording, read) for read in call.reads if recording.values[read].constant)
    ours = held and all(origin.rpartition(".")[0] + "." in own for origin in origins)
    if call.name in GAINS:
        return len(flowing) == 1 and ours and bool(origins)
    divides_by_it = call.name in ("aten.div", "aten.div_") and call.argument(0) not in flowing
    return call.name in AFFINE and len(flowing) == 1 and ours and not divides_by_it


def _can_be_made(recording: Recording, value: int) -> bool:
    """Whether a constant is made of stored tensors alone: the numbers of a literal tensor are not in a
    recording, and what torch.full or torch.arange made may depend on the size of the input."""
    waiting, seen = [value], {value}
    while waiting:
        number = waiting.pop()
        call = recording.maker(number)
        if not (call.reads if call is not None else recording.values[number].name):
            return False
        fresh = {read for read in call.reads if read not in seen} if call is not None else set()
        seen |= fresh
        waiting += fresh
    return True


def _constants(recording: Recording, call: Call) -> list[int]:
    return [read for read in call.reads if recording.values[read].constant and recording.values[read].origins]


def _scale_or_gain(
    recording: Recording, member: Member, places: Sequence[tuple[Visit, tuple[Call, ...]]]
) -> Map:
    path = member.path
    untouched(recording, path)
    visits = recording.visits_of(path)
    once = [visit.number for visit, _ in places] == [visit.number for visit in visits]
    require(once, "not-affine", f"{path} does not scale and shift once in each call")
    sites = _sites(recording, path, [chain for _, chain in places])
    whole = all(_is_all(visit, site) for (visit, _), site in zip(places, sites, strict=True))
    chains = tuple(chain for _, chain in places)
    if not whole:
        # A number before or behind the gain is no part of it: it stays.
        chains = tuple(_without_ends(recording, chain) for chain in chains)
        sites = _sites(recording, path, chains)
    kind = "scale" if whole else "gain"
    found = Map(Member(path, member.module, kind), sites, 0, chains, recording)
    require(len({o.rpartition(".")[2] for o in found.origins}) == len(found.origins), "not-affine", path)
    for name in found.origins:
        value = recording.named(f"{path}.{name}")
        ours = value is not None and found.calls >= {c.number for c in _reading(recording, value.number)}
        require(ours, "shared-weight", f"{name} of {path} is read by more than its scale")
    floating = all(recording.values[site.exit or 0].dtype.is_floating_point for site in sites)
    require(floating, "dtype", f"{path} scales what are no floating-point numbers")
    axes = {_axis(recording, chain, site) for chain, site in zip(chains, sites, strict=True)}
    require(len(axes) == 1, "bn-axis", f"{path} scales along different axes")
    result = Map(found.member, sites, axes.pop(), chains, recording)
    if kind == "gain":
        fleeting = member.module._non_persistent_buffers_set & set(result.origins)
        require(not fleeting, "not-affine", f"{', '.join(fleeting)} of {path} is in no state dict")
        result.neutral(member.module)
    alike = len({_written(recording, chain) for chain in chains}) == 1
    require(alike, "not-affine", f"{path} does not do the same in each of its calls")
    return result


def _written(recording: Recording, chain: Sequence[Call]) -> str:
    """What a chain does, in text: ops, literals, and names in place of tensors."""

    def named(read: int) -> object:
        value = recording.values[read]
        call = recording.maker(read)
        if not value.constant:
            return "x"
        return value.name or (call and (call.name, [told(a) for a in call.args]))

    def told(argument: object) -> object:
        return named(argument.value) if isinstance(argument, Ref) else repr(argument)

    return repr([(call.name, [told(a) for a in call.args], sorted(call.kwargs)) for call in chain])


def has_literals(found: Map) -> bool:
    """Whether numbers that are no tensors take part, also in what the constants are made of."""
    recording = found.recording
    assert recording is not None
    calls = {call.number: call for chain in found.chains for call in chain}
    waiting = list(calls.values())
    while waiting:
        call = waiting.pop()
        if call.name in GAINS:
            continue
        if any(isinstance(argument, int | float) for argument in call.args) and call.name not in MOVES:
            return True
        makers = (recording.maker(read) for read in _constants(recording, call))
        fresh = {maker.number: maker for maker in makers if maker is not None and maker.number not in calls}
        calls |= fresh
        waiting += fresh.values()
    return False


def _sites(recording: Recording, path: str, chains: Sequence[tuple[Call, ...]]) -> tuple[Site, ...]:
    return tuple(
        Site(
            path, turn, frozenset(call.number for call in chain), _entry(recording, chain), chain[-1].makes[0]
        )
        for turn, chain in enumerate(chains)
    )


def _without_ends(recording: Recording, chain: tuple[Call, ...]) -> tuple[Call, ...]:
    """From the first to the last op that has a tensor of the module's own."""
    own = [number for number, call in enumerate(chain) if _constants(recording, call)]
    return chain[own[0] : own[-1] + 1]


def _reading(recording: Recording, value: int) -> Iterator[Call]:
    """The calls that use what a constant becomes, once it has been moved or computed with constants."""
    waiting, seen = [value], {value}
    while waiting:
        for call in recording.readers(waiting.pop()):
            if call.op is not None and call.makes and all(recording.values[v].constant for v in call.makes):
                fresh = [made for made in call.makes if made not in seen]
                seen.update(fresh)
                waiting += fresh
            else:
                yield call


def _entry(recording: Recording, chain: Sequence[Call]) -> int | None:
    """What the first op reads; a gain inside of a norm has nothing before it."""
    if chain[0].name in GAINS:
        return None
    return next(read for read in chain[0].reads if not recording.values[read].constant)


def _is_all(visit: Visit, site: Site) -> bool:
    """Whether a module does nothing but this."""
    return visit.plain and visit.takes == (site.entry,) and visit.gives == (site.exit,)


def _axis(recording: Recording, chain: Sequence[Call], site: Site) -> int:
    """The one axis that the constants lie along, counted from the end."""
    assert site.exit is not None
    rank = len(recording.values[site.exit].shape)
    require(rank > 1, "bn-axis", "there is no channel axis")
    if chain[0].name == "aten.native_group_norm":
        return 1 - rank
    along = {
        axis - len(recording.values[read].shape)
        for call in chain
        for read in _constants(recording, call)
        for axis, size in enumerate(recording.values[read].shape)
        if size > 1
    }
    require(len(along) <= 1, "bn-axis", "the constants lie along several axes")
    return along.pop() if along else 1 - rank
