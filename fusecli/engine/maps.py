"""Per-channel affine maps in a run: norms, modules that only scale and shift, and gains inside of others.

A map is what the fold moves. A norm and a scale are modules that do nothing else and become identities; a
gain is the part of a module (LayerNorm, RMSNorm, a block with a LayerScale of its own) that is one: the
module stays, its gain becomes neutral.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from fusecli.algebra import ChannelAffine
from fusecli.engine.decisions import Member
from fusecli.engine.inside import norm_at_work, untouched
from fusecli.errors import NotFoldable, require
from fusecli.graph.dataflow import Call, Recording, Ref, Visit
from fusecli.graph.kinds import FOLDABLE, NORM_KINDS, is_exact
from fusecli.graph.labels import along, labels_at
from fusecli.graph.lift import channel_affine
from fusecli.graph.ops import AFFINE, GAINS, MOVES
from fusecli.graph.replay import Replay
from fusecli.graph.sites import Site, flowing

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Map:
    """One affine map and everywhere it is applied.

    sites    for each call of the module where it is: what comes in (None: no tensor does) and what goes out
    axis     the channel axis of both, counted from the end for a gain, from the front for a norm
    chains   the ops of each site, for a scale and a gain
    """

    member: Member
    sites: tuple[Site, ...]
    axis: int
    chains: tuple[tuple[Call, ...], ...] = ()
    recording: Recording | None = None

    @property
    def path(self) -> str:
        return self.member.path

    @property
    def calls(self) -> frozenset[int]:
        """The ops of a scale or a gain."""
        return frozenset(call.number for chain in self.chains for call in chain)

    @property
    def last(self) -> int:
        """When it is applied for the last time."""
        return max(site.exit or 0 for site in self.sites)

    @property
    def origins(self) -> tuple[str, ...]:
        """The tensors, by their name in the module, that a scale or a gain is made of."""
        assert self.recording is not None
        values = self.recording.values
        names = {
            o for call in self.chains[0] for v in call.reads if values[v].constant for o in values[v].origins
        }
        return tuple(sorted(name.rpartition(".")[2] for name in names))

    def affine(self, module: nn.Module) -> ChannelAffine:
        """Its value, with the tensors of `module`."""
        if self.member.kind in NORM_KINDS:
            return channel_affine(module)
        return self._value(lambda name: _held(module, name))

    def neutral(self, module: nn.Module) -> dict[str, Tensor]:
        """Tensors, by their name in the module, with which a gain does nothing."""
        held = {name: _held(module, name) for name in self.origins}
        for choice in product((1.0, 0.0), repeat=len(held)):
            filled = {
                n: torch.full(t.shape, v, dtype=torch.float64)
                for (n, t), v in zip(held.items(), choice, strict=True)
            }
            value = self._value(filled.__getitem__)
            if bool((value.scale == 1).all()) and not bool(value.shift.any()):
                return {n: torch.full_like(held[n], v) for n, v in zip(held, choice, strict=True)}
        raise NotFoldable(
            "not-affine", f"no values of {', '.join(held)} make the gain of {self.path} neutral"
        )

    def _value(self, held: Callable[[str], Tensor]) -> ChannelAffine:
        assert self.recording is not None
        exit = self.sites[0].exit
        assert exit is not None
        shape = self.recording.values[exit].shape
        shifts = any(_shifts(call) for call in self.chains[0])
        if any(held(name).is_meta for name in self.origins):
            unknown = torch.empty(shape[self.axis], dtype=torch.float64, device="meta")
            return ChannelAffine(unknown, unknown, shifts)
        constants = Replay(self.recording, lambda name: held(name.rpartition(".")[2]).double())
        scale, shift = _evaluated(self.chains[0], constants)
        return ChannelAffine(_vector(scale, shape, self.axis), _vector(shift, shape, self.axis), shifts)


def _held(module: nn.Module, name: str) -> Tensor:
    parameter = module._parameters.get(name)
    tensor = module._buffers.get(name) if parameter is None else parameter
    require(tensor is not None, "not-affine", f"{name} is neither a parameter nor a buffer")
    assert tensor is not None
    return tensor.detach()


def norm_map(recording: Recording, member: Member) -> Map:
    """The map that a norm module is; raises NotFoldable where it is none."""
    sites = tuple(norm_at_work(recording, member))
    axes = {1} if is_exact(member.module) else {_norm_axis(recording, member, site) for site in sites}
    require(len(axes) == 1, "bn-axis", f"{member.path} normalises different axes")
    return Map(member, sites, axes.pop())


def _norm_axis(recording: Recording, member: Member, site: Site) -> int:
    """The axis along which a norm of an unknown class has its channels: there labels on what comes in meet
    those on its vectors."""
    assert site.entry is not None
    shape = recording.values[site.entry].shape
    last = flowing(recording, recording.visits_of(member.path)[site.visit])[-1]
    vectors = [value for value in recording.tensors_of(member.path) if len(value.shape) == 1]
    for axis in range(1, len(shape)):
        if any(value.shape != (shape[axis],) for value in vectors):
            continue
        seeds = {value.number: along(value.shape, 0) for value in vectors}
        labels = labels_at(recording, last.makes[0], {**seeds, site.entry: along(shape, axis)})
        given = recording.values[last.makes[0]].shape
        if labels is not None and given == shape and torch.equal(labels, along(shape, axis)):
            return axis
    raise NotFoldable("bn-axis", f"the channels of {member.path} are on no axis of what comes in")


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
    names = {f"{path}.{name}" for name in found.origins}
    for name in names:
        value = recording.named(name)
        held = (
            value is not None
            and len(
                {c.number for c in _reading(recording, value.number)}
                - {c.number for ch in chains for c in ch}
            )
            == 0
        )
        require(held, "shared-weight", f"{name} is read by more than its scale")
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
    calls = [call for chain in found.chains for call in chain]
    for call in calls:
        if call.name in GAINS:
            continue
        if any(isinstance(argument, int | float) for argument in call.args) and call.name not in MOVES:
            return True
        makers = (recording.maker(read) for read in _constants(recording, call))
        calls += [maker for maker in makers if maker is not None]
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
    for call in recording.readers(value):
        if call.op is not None and call.makes and all(recording.values[v].constant for v in call.makes):
            for made in call.makes:
                yield from _reading(recording, made)
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


def _vector(tensor: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The entries along `axis` of a tensor that is broadcast to `shape`, as float64."""
    spread = tensor.double().expand(torch.broadcast_shapes(tensor.shape, (1,) * len(shape)))
    line = spread.reshape(-1)
    return line.expand(shape[axis]).clone() if line.numel() == 1 else line.clone()


def _shifts(call: Call) -> bool:
    if call.name in GAINS:
        return any(call.argument(position) is not None for position in GAINS[call.name][1:])
    return call.name.rstrip("_") in ("aten.add", "aten.sub", "aten.rsub")


def _evaluated(chain: Sequence[Call], constants: Replay) -> Pair:
    """Scale and shift of ops in a row."""
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    pair = (one, zero)
    for call in chain:
        if call.name in GAINS:
            vectors = [call.argument(position) for position in GAINS[call.name]]
            held = [None if vector is None else constants.at(vector) for vector in vectors]
            pair = (
                one if held[0] is None else held[0],
                zero if held[-1] is None or len(held) < 2 else held[-1],
            )
        else:
            pair = _step(call, pair, constants)
    return pair


def _step(call: Call, pair: Pair, constants: Replay) -> Pair:
    """What one affine op makes of s x + t."""
    values = constants.recording.values
    operands: list[Tensor | None] = []
    for position in range(len(call.args)):
        read = call.argument(position)
        if read is None:
            literal = call.args[position]
            operands.append(
                torch.tensor(literal, dtype=torch.float64) if isinstance(literal, int | float) else None
            )
        else:
            operands.append(constants.at(read) if values[read].constant else None)
    flowing = next(
        i for i in range(len(call.args)) if (r := call.argument(i)) is not None and not values[r].constant
    )
    rule = _ALGEBRA.get(call.name.rstrip("_"))
    require(rule is not None and "rounding_mode" not in call.kwargs, "not-affine", call.name)
    assert rule is not None
    return rule(pair, operands, flowing, dict(call.kwargs))


def _sum(
    pair: Pair, operands: list[Tensor | None], flowing: int, options: Mapping[str, object], sign: int
) -> Pair:
    """x + alpha c, or c + alpha x; `sign` is that of the second."""
    alpha = float(options.get("alpha", 1)) * sign  # type: ignore[arg-type]
    other = operands[1 - flowing]
    require(other is not None, "not-affine", "an op without its second operand")
    assert other is not None
    if flowing == 0:
        return pair[0], pair[1] + alpha * other
    return alpha * pair[0], alpha * pair[1] + other


def _product(pair: Pair, operands: list[Tensor | None], flowing: int, _: Mapping[str, object]) -> Pair:
    other = operands[1 - flowing]
    require(other is not None, "not-affine", "an op without its second operand")
    assert other is not None
    return pair[0] * other, pair[1] * other


def _quotient(pair: Pair, operands: list[Tensor | None], flowing: int, _: Mapping[str, object]) -> Pair:
    other = operands[1]
    require(flowing == 0 and other is not None, "not-affine", "a constant is divided by what flows")
    assert other is not None
    return pair[0] / other, pair[1] / other


def _reversed(pair: Pair, operands: list[Tensor | None], flowing: int, options: Mapping[str, object]) -> Pair:
    """rsub: the second operand less the first."""
    scale, shift = _sum(pair, operands, flowing, options, -1)
    return -scale, -shift


def _negative(pair: Pair, _: list[Tensor | None], __: int, ___: Mapping[str, object]) -> Pair:
    return -pair[0], -pair[1]


_ALGEBRA: dict[str, Callable[[Pair, list[Tensor | None], int, Mapping[str, object]], Pair]] = {
    "aten.add": lambda pair, operands, flowing, options: _sum(pair, operands, flowing, options, 1),
    "aten.sub": lambda pair, operands, flowing, options: _sum(pair, operands, flowing, options, -1),
    "aten.rsub": _reversed,
    "aten.mul": _product,
    "aten.div": _quotient,
    "aten.neg": _negative,
}
