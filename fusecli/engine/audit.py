"""The audit: is a group what the recorded run shows? Asked before any weight is touched.

Adjacent in this order, the next one the only reader, every call of every member a call of the same group,
weights read by nobody else, the norm in inference mode, and the layer's channels where the norm has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fusecli.engine.channels import same_channels
from fusecli.engine.decisions import Group, Member, Vocabulary
from fusecli.engine.inside import applied_as_is, layer_at_work, norm_at_work
from fusecli.engine.siblings import Siblings
from fusecli.errors import NotFoldable, require
from fusecli.graph.dataflow import Call, Recording, described
from fusecli.graph.kinds import FOLDABLE, LAYER_KINDS, NORM_KINDS, is_exact
from fusecli.graph.lift import linear_op, require_fixed
from fusecli.graph.ops import MOVES, RESHAPES
from fusecli.graph.padding import padded_values
from fusecli.graph.record import Run
from fusecli.graph.sites import (
    Site,
    module_sites,
    next_step,
    reads_through,
    strangers,
)
from fusecli.rewrite import ModuleTree

_VECTORS = ("weight", "bias", "running_mean", "running_var")
_TEACH = "teach it with extra_mappings (treat, or sequence and fuser) or leave it out"
SIZE_ONE = "shown for an axis of size 1 only: try inputs in which no axis has size 1"
_ALONE = "leave the group out, or give each place its own module and train again"


@dataclass(frozen=True)
class Found:
    """What the run shows of a group.

    reached  for each later member, which of its calls belong to the group
    caveats  what the recorded sizes could not show
    shown    whether the layer, of whatever class, applies its stored weight and bias as they are
    """

    reached: Mapping[str, frozenset[int]]
    caveats: tuple[str, ...] = ()
    shown: bool = False


@dataclass
class Audit:
    """Audits the groups of one model against one run."""

    run: Run
    tree: ModuleTree
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        self.recording: Recording = self.run.recording
        self._norms: dict[str, list[Site]] = {}

    def norm_sites(self, norm: Member) -> list[Site]:
        """Where a norm reads and writes, worked out once; raises NotFoldable."""
        if norm.path not in self._norms:
            self._norms[norm.path] = norm_at_work(self.recording, norm)
        return self._norms[norm.path]

    @cached_property
    def unbiased(self) -> list[str]:
        """Layers without a bias whose class is not known: would they add one?"""
        return [
            path
            for path in self.recording.names
            if path
            and self.recording.visits_of(path)
            and self.member(path).kind in LAYER_KINDS
            and not is_exact(self.tree[path])
            and self.tree[path]._parameters.get("bias") is None
        ]

    @cached_property
    def _padded(self) -> dict[int, str]:
        return padded_values(self.recording, self.tree.modules)

    def require_unpadded(self, value: int) -> None:
        """Guard: no map crosses a place where other inputs may find zeros that nothing has computed."""
        path = self._padded.get(value)
        require(
            path is None,
            "padded-rows",
            f"given a padding mask, {path} fills the rows of what it gives with zeros on torch's fast path: "
            "no norm can be moved across that",
            evidence=(f"{path} has enable_nested_tensor and batch_first, and no norm behind its layers",),
            remedy=f"say enable_nested_tensor=False where {path} is built",
        )

    def member(self, path: str) -> Member:
        return Member(path, self.tree[path], self.vocabulary.kind(self.tree[path]))

    def ran(self, group: Group) -> bool:
        """Whether the run used any module of the group: of one that did not run, nothing is known."""
        recording = self.recording
        return any(recording.visits_of(path) or strangers(recording, path) for path in group.modules)

    def start(self, path: str) -> int:
        """When a module was called first: groups are listed in the order of the run."""
        visits = self.recording.visits_of(path)
        return visits[0].number if visits else len(self.recording.visits)

    def group(self, members: Sequence[Member], *, custom: bool = False) -> Found:
        """Guard for members that are fused into one: raises NotFoldable unless the run shows that they are.

        custom  a user's fuser takes the modules as they are: nothing is asked of their insides
        """
        first, *others = members
        # Where nothing is folded, modules only move: their tensors may be computed, or read by others.
        custom = custom or first.kind not in LAYER_KINDS or others[0].kind not in NORM_KINDS
        sites = self._sites(first, custom)
        firsts, reached_by = sites, {}
        crossed: list[Call] = []
        for before, member in zip(members, others, strict=False):
            following = self._sites(member, custom)
            reached = self._linked(before, sites, member, following, first.path)
            if not custom and before is first:
                self._same_dtype(member, reached)
                same_channels(self.recording, first, sites, member, reached)
            reached_by[member.path] = frozenset(site.visit for site in reached)
            for site, target in zip(sites, reached, strict=True):
                crossed += self._between(before, site, target, first.path)
            sites = reached
        shown = not custom and applied_as_is(self.recording, first.path, firsts)
        return Found(reached_by, self._caveats(crossed), shown)

    def unrun(self, members: Sequence[str]) -> tuple[str, ...]:
        """The modules beside these that no input has run, though another one may."""
        if not (found := self._siblings.beside(members)):
            return ()
        others = self.run.called_by_others
        return Siblings(self.tree, {*self._siblings.called, *others}).beside(members) if others else found

    @cached_property
    def _siblings(self) -> Siblings:
        recording = self.recording
        return Siblings(self.tree, {visit.path for visit in recording.visits} | recording.elsewhere.keys())

    def _caveats(self, crossed: Sequence[Call]) -> tuple[str, ...]:
        """Where an axis has size 1, a view that moves channels to it looks like one that does not."""
        shapes = {self.recording.values[value].shape for call in crossed for value in call.reads}
        if any(call.name in RESHAPES for call in crossed) and any(1 in shape for shape in shapes):
            return (SIZE_ONE,)
        return ()

    def _same_dtype(self, norm: Member, reached: Sequence[Site]) -> None:
        """An identity in the norm's place converts nothing."""
        for site in reached:
            assert site.entry is not None
            assert site.exit is not None
            before, after = (self.recording.values[value].dtype for value in (site.entry, site.exit))
            require(
                before == after,
                "dtype",
                f"{norm.path} turns {before} into {after}, which an identity would not do",
                remedy="convert the norm to the layer's dtype first",
            )

    def _between(self, before: Member, site: Site, target: Site, layer: str) -> tuple[Call, ...]:
        """The moves on the way from one member to the next, outside of both."""
        inside = self.recording.visits_of(before.path)[site.visit].calls
        calls: list[Call] = []
        value = site.exit
        while value is not None and value != target.entry:
            (call,) = self.recording.readers(value)
            if call.number not in inside:
                calls.append(call)
            value = next_step(self.recording, value, layer)
        return tuple(calls)

    def follows(self, before: Member, kept: Member) -> None:
        """Guard for a member that stays where it is: it has to read what the one before it gives."""
        sites, following = self._sites(before, True), self._sites(kept, True)
        entries = {site.entry for site in following}
        for site in sites:
            if site.exit is None or site.exit not in entries:
                raise self._not_adjacent(before, site, kept, following)

    def missed(self, path: str, reached: frozenset[int]) -> NotFoldable | None:
        """Why a module cannot be taken out: it is called where no group has it. None if it can."""
        others = [v for turn, v in enumerate(self.recording.visits_of(path)) if turn not in reached]
        if not others:
            return None
        sources = (self.source(value) for visit in others for value in visit.takes)
        return NotFoldable(
            "shared-module",
            f"{path} is called outside of the group too: {len(others)} of {len(others) + len(reached)} calls",
            evidence=tuple(
                dict.fromkeys(f"{path} also reads what comes from {source}" for source in sources)
            ),
            remedy="list a group for each layer that feeds it, or leave it out",
        )

    def _sites(self, member: Member, custom: bool) -> list[Site]:
        path = member.path
        if not custom and member.kind in LAYER_KINDS:
            linear_op(member.module, transposed=member.kind == "conv_transpose")
        elif not custom and member.kind in NORM_KINDS:
            require_fixed(member.module)
        if custom or member.kind not in FOLDABLE:
            sites = module_sites(self.recording, path)
            require(bool(sites), "not-executed", f"{path} did not run, though other members of its group did")
            return sites
        if member.kind in NORM_KINDS:
            return self.norm_sites(member)
        return layer_at_work(self.run, member, self.unbiased)

    def _linked(
        self, before: Member, sites: Sequence[Site], member: Member, following: Sequence[Site], layer: str
    ) -> list[Site]:
        """For each site of `before` the one of `member` that alone reads what it gives."""
        found = [self._next(before, site, member, following, layer) for site in sites]
        lost = [site for site, target in zip(sites, found, strict=True) if target is None]
        if lost and len(lost) < len(sites):
            seen = tuple(
                f"call {site.visit + 1} of {before.path} is read by "
                + (member.path if target is not None else self._ends(site.exit, layer))
                for site, target in zip(sites, found, strict=True)
            )
            raise NotFoldable(
                "shared-module",
                f"{before.path} is called {len(sites)} times, and {member.path} follows only "
                f"{len(sites) - len(lost)} of them",
                evidence=seen,
                remedy=_ALONE,
            )
        if lost:
            raise self._not_adjacent(before, lost[0], member, following)
        return [target for target in found if target is not None]

    def _next(
        self, before: Member, site: Site, member: Member, following: Sequence[Site], layer: str
    ) -> Site | None:
        value = site.exit
        while value is not None:
            self.require_unpadded(value)
            readers = self.recording.readers(value)
            for target in following:
                if target.entry == value:
                    self._sole(before, member, [r for r in readers if r.number not in target.calls])
                    return target
            onward = next_step(self.recording, value, layer)
            if onward is None and len(readers) > 1:
                reached = {call.number for call, _ in reads_through(self.recording, value)}
                if any(reached & target.calls for target in following):
                    ours = frozenset().union(*(target.calls for target in following))
                    self._sole(before, member, [r for r in readers if r.number not in ours])
            value = onward
        return None

    def _sole(self, before: Member, member: Member, others: Sequence[Call]) -> None:
        if not others:
            return
        norms = [path for call in others if (path := self.norm_around(call)) is not None]
        require(
            len(norms) < len(others),
            "shared-module",
            f"{before.path} feeds several norms: {member.path}, {', '.join(norms)}",
            evidence=described(self.recording, others),
            remedy=_ALONE,
        )
        raise NotFoldable(
            "multiple-consumers",
            f"{member.path} is not the only one to read what {before.path} gives",
            evidence=described(self.recording, others),
            remedy="leave the group out: the other readers would see folded values",
        )

    def norm_around(self, call: Call) -> str | None:
        """The norm module that an op call runs in."""
        paths = (self.recording.visits[number].path for number in reversed(call.visits))
        return next(
            (path for path in paths if path and self.member(path).kind in (*NORM_KINDS, "batch_dependent")),
            None,
        )

    def _not_adjacent(
        self, before: Member, site: Site, member: Member, following: Sequence[Site]
    ) -> NotFoldable:
        ends = self._ends(site.exit, before.path)
        entry = following[0].entry if following else None
        source = self.source(entry) if entry is not None else "several tensors"
        evidence = (f"{before.path} is read by {ends}", f"{member.path} reads what comes from {source}")
        return NotFoldable(
            "not-adjacent",
            f"{member.path} does not follow {before.path}",
            evidence=(f"between them stands {ends}",) if ends == source else evidence,
            remedy="correct the pairing, or leave the group out; 'fusecli plan' lists what can be folded",
        )

    def _ends(self, value: int | None, layer: str) -> str:
        """Who reads a value, once it has been moved to where it is used."""
        while value is not None and (onward := next_step(self.recording, value, layer)) is not None:
            value = onward
        readers = self.recording.readers(value) if value is not None else []
        return ", ".join(dict.fromkeys(described(self.recording, readers))) or "nobody"

    def source(self, value: int) -> str:
        """What made a value, in words, moves left out."""
        while (call := self.recording.maker(value)) is not None and call.name in MOVES:
            value = call.reads[0]
        if call is not None:
            return self.recording.described(call)
        return self.recording.values[value].name or "outside of the model"
