"""Sums in a run whose addends are computed from one tensor: branches that one layer can stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fusecli.engine.decisions import Member
from fusecli.engine.maps import Map
from fusecli.engine.products import in_identity
from fusecli.engine.routes import Routes
from fusecli.errors import NotFoldable
from fusecli.graph.dataflow import Call, Recording
from fusecli.graph.kinds import LAYER_KINDS, is_identity
from fusecli.graph.ops import SUMS
from fusecli.graph.sites import Site


@dataclass(frozen=True)
class Branch:
    """One addend: the module that ends it, what goes into it, and its place in the sum."""

    member: Member
    entry: int
    leaf: int
    map: Map | None = None

    @property
    def same(self) -> bool:
        """Whether it is the tensor itself, by way of an nn.Identity."""
        return is_identity(self.member.module)


@dataclass(frozen=True)
class Sum:
    """A sum with several branches from one tensor; `bare` counts addends that are that tensor itself.

    written  for each addition in place, the addends that are in what it writes to
    """

    branches: tuple[Branch, ...]
    bare: int
    written: tuple[frozenset[int], ...]

    def may_stay(self, branch: Branch) -> bool:
        """Whether forward runs where all other branches give a scalar: nothing is added to one in place."""
        return all(branch.leaf in leaves for leaves in self.written)


@dataclass(frozen=True)
class Addends:
    """A sum as it stands in a run. `around`: the modules that its addends were made in."""

    leaves: tuple[int, ...]
    written: tuple[frozenset[int], ...]
    around: frozenset[str]


def addends(recording: Recording) -> Iterator[Addends]:
    """Every sum of the run, taken apart."""
    for root in recording.calls:
        if not _adds(recording, root) or not recording.alive[root.number]:
            continue
        readers = recording.readers(root.makes[0])
        if len(readers) == 1 and _adds(recording, readers[0]):
            continue  # part of a larger one
        tree = _Tree(recording, root.makes[0])
        try:
            tree.open(tree.root)
        except RecursionError:
            continue  # more addends than anybody writes down
        makers = [call for leaf in tree.leaves if (call := recording.maker(leaf)) is not None]
        around = frozenset(recording.visits[number].path for call in makers for number in call.visits)
        yield Addends(tuple(tree.leaves), tuple(tree.written), around)


def sums(
    routes: Routes, found: Iterable[Addends], sites_of: Callable[[Member], Sequence[Site]]
) -> Iterator[Sum]:
    """Those sums with several branches from one tensor, or one and the tensor itself, in order."""
    for tree in found:
        if not any(routes.may(path) for path in tree.around):
            continue
        by_entry: dict[int, list[Branch]] = {}
        # An addend that is there twice counts twice: no layer can take it over as it is.
        for leaf in (leaf for leaf in tree.leaves if tree.leaves.count(leaf) == 1):
            branch = _branch(routes, sites_of, leaf)
            if branch is not None:
                by_entry.setdefault(branch.entry, []).append(branch)
        for entry, branches in by_entry.items():
            bare = tree.leaves.count(entry)
            if len({branch.member.path for branch in branches}) > 1 or bare:
                yield Sum(tuple(branches), bare, tree.written)


@dataclass
class _Tree:
    recording: Recording
    root: int
    leaves: list[int] = field(default_factory=list)
    written: list[frozenset[int]] = field(default_factory=list)

    def open(self, value: int) -> frozenset[int]:
        """Takes the sum that `value` is apart; answers with its addends."""
        call = self.recording.maker(value)
        inner = call is not None and _adds(self.recording, call)
        shared = value != self.root and len(self.recording.readers(value)) > 1
        if call is None or not inner or shared:
            self.leaves.append(value)
            return frozenset([value])
        found = [self.open(read) for read in _flowing(self.recording, call)]
        if call.writes:
            self.written.append(found[0])
        return frozenset().union(*found)


def _flowing(recording: Recording, call: Call) -> list[int]:
    return [read for read in call.reads if not recording.values[read].constant]


def _adds(recording: Recording, call: Call) -> bool:
    """Whether it adds two tensors of one shape as they are, or a literal 0 to one."""
    if call.name not in SUMS or call.kwargs.get("alpha", 1) != 1 or len(call.makes) != 1:
        return False
    flowing = _flowing(recording, call)
    shapes = {recording.values[value].shape for value in (*flowing, call.makes[0])}
    nothing = len(call.args) > 1 and type(call.args[1]) in (int, float) and call.args[1] == 0
    return len(shapes) == 1 and (
        len(flowing) == 2 or (len(flowing) == 1 and len(call.reads) == 1 and nothing)
    )


def _branch(routes: Routes, sites_of: Callable[[Member], Sequence[Site]], leaf: int) -> Branch | None:
    """The layer or the map that gives `leaf`, if it is called once and nothing else reads what it gives."""
    recording, value = routes.recording, leaf
    while True:
        if len(recording.readers(value)) != 1 and value != leaf:
            return None
        found = routes.giving(value)
        if found is None:
            break
        before, site = found
        if before.path not in routes.gone:
            single = len(before.sites) == 1 and site.entry is not None and before.member.kind != "gain"
            alone = single and len(recording.readers(leaf)) == 1 and routes.may(before.path)
            return Branch(before.member, site.entry or 0, leaf, before) if alone else None
        if site.entry is None:
            return None
        value = site.entry
    inner = _before_identities(routes, value)
    if inner != value and _layer(routes, inner) is not None:
        value = inner
    elif value == leaf and (identity := _identity(routes, value)) is not None:
        entry = recording.values[value].made_by
        assert entry is not None
        alone = len(recording.readers(leaf)) == 1 and routes.may(identity.path)
        return Branch(identity, recording.calls[entry].reads[0], leaf) if alone else None
    member = _layer(routes, value)
    if member is None or not routes.may(member.path) or len(recording.readers(leaf)) != 1:
        return None
    try:
        sites = sites_of(member)
    except NotFoldable:
        return None
    (visit, *more) = recording.visits_of(member.path)
    if more or len(sites) != 1 or len(visit.takes) != 1 or len(recording.readers(value)) != 1:
        return None
    return Branch(member, visit.takes[0], leaf)


def _layer(routes: Routes, value: int) -> Member | None:
    """The layer whose call gives `value`: of more than two axes, a linear layer takes them apart and joins
    them again around its product."""
    call = routes.recording.maker(value)
    for number in call.visits if call is not None else ():
        visit = routes.recording.visits[number]
        member = routes.audit.member(visit.path) if visit.path else None
        if member is not None and member.kind in LAYER_KINDS and visit.gives == (value,):
            return member
    return None


def _identity(routes: Routes, value: int) -> Member | None:
    """The nn.Identity that gives `value`; called once."""
    recording = routes.recording
    call = recording.maker(value)
    path = "" if call is None else recording.inside(call)
    member = routes.audit.member(path) if path else None
    if member is None or not is_identity(member.module) or len(recording.visits_of(path)) != 1:
        return None
    return member


def _before_identities(routes: Routes, value: int) -> int:
    """What nn.Identity modules were given that gave `value`."""
    while (call := routes.recording.maker(value)) is not None and in_identity(routes.audit, call):
        value = call.reads[0]
    return value
