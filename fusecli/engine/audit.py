"""The audit: is a group what the recorded run shows? Asked before any weight is touched.

Adjacent in this order, the next one the only reader, every call of every member a call of the same group,
weights read by nobody else, the norm in inference mode, and the layer's channels where the norm has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fusecli.engine.decisions import Group, Vocabulary
from fusecli.equivalence.groups import Pass
from fusecli.errors import NotFoldable, UsageError, require
from fusecli.graph.dataflow import Call, Recording, Visit
from fusecli.graph.kinds import FOLDABLE, LAYER_KINDS, NORM_KINDS, is_exact
from fusecli.graph.labels import CONFLICT, labels_at
from fusecli.graph.lift import linear_op, require_fixed
from fusecli.graph.ops import AFFINE, ALWAYS_BATCH, MOVES, NORMS
from fusecli.graph.record import Run
from fusecli.graph.sites import (
    Site,
    adds_bias,
    channel_seeds,
    flowing,
    layer_sites,
    module_sites,
    next_step,
    reads_through,
    strangers,
)
from fusecli.rewrite import ModuleTree

_VECTORS = ("weight", "bias", "running_mean", "running_var")
_TEACH = "teach it with extra_mappings (treat, or sequence and fuser) or leave it out"
_ALONE = "leave the group out, or give each place its own module and train again"


@dataclass(frozen=True)
class Member:
    """A module of a group, its path and its kind (fusecli.graph.kinds)."""

    path: str
    module: nn.Module
    kind: str


@dataclass(frozen=True)
class Found:
    """What the run shows of a group.

    passes   the calls of the members that belong together
    reached  for each later member, which of its calls belong to the group
    """

    passes: tuple[Pass, ...]
    reached: Mapping[str, frozenset[int]]


@dataclass
class Audit:
    """Audits the groups of one model against one run."""

    run: Run
    tree: ModuleTree
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        self.recording: Recording = self.run.recording

    def member(self, path: str) -> Member:
        return Member(path, self.tree[path], self.vocabulary.kind(self.tree[path]))

    def ran(self, group: Group) -> bool:
        """Whether the run called any module of the group: of one that did not run, nothing is known."""
        return any(self.recording.visits_of(path) for path in group.modules)

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
        bridges: list[list[tuple[Call, ...]]] = [[] for _ in sites]
        for before, member in zip(members, others, strict=False):
            following = self._sites(member, custom)
            reached = self._linked(before, sites, member, following, first.path)
            if not custom and before is first:
                self._same_channels(first, sites, member, reached)
            reached_by[member.path] = frozenset(site.visit for site in reached)
            for bridge, site, target in zip(bridges, sites, reached, strict=True):
                bridge.append(self._between(before, site, member, target, first.path))
            sites = reached
        passes = zip(firsts, sites, bridges, strict=True)
        return Found(tuple(Pass(a.visit, z.visit, tuple(b)) for a, z, b in passes), reached_by)

    def _between(
        self, before: Member, site: Site, member: Member, target: Site, layer: str
    ) -> tuple[Call, ...]:
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
        self._untouched(path)
        return self._norm_sites(member) if member.kind in NORM_KINDS else self._layer_sites(member)

    def _untouched(self, path: str) -> None:
        recording = self.recording
        written = sorted(f"{path}.{name}" for name in _VECTORS if f"{path}.{name}" in recording.written)
        require(
            not written,
            "written-in-forward",
            f"forward writes to {', '.join(written)}",
            remedy="leave the group out",
        )
        readers = strangers(recording, path)
        if readers and not recording.visits_of(path):
            seen = self._all(readers)
            raise NotFoldable(
                "functional-layer",
                f"{path} is never called: its tensors are used by function calls",
                evidence=seen,
                remedy="call the module in forward instead",
            )
        require(
            not readers,
            "shared-weight",
            f"the tensors of {path} are also read outside of its own forward",
            evidence=self._all(readers),
            remedy="leave the group out: the other reader would see folded values",
        )
        require(bool(recording.visits_of(path)), "not-executed", "it did not run on these inputs")

    def _layer_sites(self, member: Member) -> list[Site]:
        path, sites = member.path, layer_sites(self.recording, member.path)
        visits = len(self.recording.visits_of(path))
        if not sites and is_exact(member.module):
            raise NotFoldable(
                "derived-weight",
                f"the weight that {path} applies is no parameter of its own",
                remedy="store the weight it is computed to, as a plain parameter",
            )
        require(
            [site.visit for site in sites] == list(range(visits)),
            "not-linear-in-weight",
            f"{path} does not apply its weight once in each call",
            evidence=(f"{visits} calls, its weight applied {len(sites)} times",),
            remedy=_TEACH,
        )
        self._bias_is_read(member, sites)
        return sites

    def _bias_is_read(self, member: Member, sites: Sequence[Site]) -> None:
        """A bias that the fold adds or changes has to reach the output of every call."""
        recording, path = self.recording, member.path
        if member.module._parameters.get("bias") is None:
            if is_exact(member.module):
                return
            try:
                recording = self.run.with_biases([path])
            except UsageError as error:
                raise NotFoldable(
                    "bias-not-read", f"{path} does not run with a bias", evidence=(str(error),), remedy=_TEACH
                ) from error
        visits = recording.visits_of(path)
        read = [
            any(
                any(adds_bias(recording, call, value, path) for value in call.reads)
                for call in flowing(recording, visit)
            )
            for visit in visits
        ]
        require(
            all(read),
            "bias-not-read",
            f"{path} does not add a bias that it is given",
            evidence=(f"{type(member.module).__name__} read it in {sum(read)} of {len(read)} calls",),
            remedy=_TEACH,
        )

    def norm_sites(self, member: Member) -> list[Site]:
        """Where a norm reads and writes; raises NotFoldable where it is no affine in this run."""
        self._untouched(member.path)
        return self._norm_sites(member)

    def _norm_sites(self, member: Member) -> list[Site]:
        recording = self.recording
        visits = recording.visits_of(member.path)
        return [self._norm_site(member, visit, turn) for turn, visit in enumerate(visits)]

    def _norm_site(self, member: Member, visit: Visit, turn: int) -> Site:
        recording, path = self.recording, member.path
        flow = flowing(recording, visit)
        weights = [value for value in visit.takes if recording.values[value].constant]
        require(
            not weights,
            "norm-on-weights",
            f"{path} normalises weights, not activations",
            evidence=tuple(", ".join(sorted(recording.values[value].origins)) for value in weights),
        )
        for call in flow:
            require(
                not _uses_batch(call),
                "batch-statistics",
                f"{path} normalises by the statistics of the batch, in eval mode too",
                evidence=(recording.described(call),),
                remedy="set momentum and track_running_stats as for inference, or leave it out",
            )
        if not is_exact(member.module):
            self._affine_inside(member, flow)
        inner = [call for call in flow if call.name in NORMS or not is_exact(member.module)] or flow
        require(bool(inner), "not-affine", f"{path} computes nothing from its input", remedy=_TEACH)
        self._remainder(member, visit, inner[-1])
        made = set(range(visit.calls.start, visit.calls.stop))
        entries = {
            value
            for call in flow
            for value in call.reads
            if not recording.values[value].constant and recording.values[value].made_by not in made
        }
        require(
            len(entries) == 1 and len(visit.gives) == 1,
            "not-affine",
            f"{path} does not make one tensor from one tensor",
            remedy=_TEACH,
        )
        return Site(path, turn, frozenset(made), entries.pop(), visit.gives[0])

    def _affine_inside(self, member: Member, flow: Sequence[Call]) -> None:
        recording = self.recording
        for call in flow:
            operands = {value for value in call.reads if not recording.values[value].constant}
            require(
                call.name in NORMS or (call.name in (AFFINE | MOVES) and len(operands) == 1),
                "not-affine",
                f"{type(member.module).__name__} does more than scale and shift: {call.name}",
                evidence=(recording.described(call),),
                remedy=_TEACH,
            )

    def _remainder(self, member: Member, visit: Visit, affine: Call) -> None:
        """What stays of a norm with submodules has to be those, once each and in their order."""
        recording = self.recording
        children = [name for name, child in member.module._modules.items() if child is not None]
        called = recording.visits_in(visit)
        value = affine.makes[0]
        for name, child in zip(children, called, strict=False):
            right = child.path == recording.first_name[f"{member.path}.{name}"] and child.takes == (value,)
            require(
                right and len(child.gives) == 1,
                "not-affine",
                f"{member.path} does not call its submodules in a row, once each, after it has normalised",
                evidence=(f"{child.path} was called where {name} was expected",),
                remedy=_TEACH,
            )
            value = child.gives[0]
        while (after := self._moved(value, visit)) is not None:
            value = after
        require(
            len(called) == len(children) and visit.gives == (value,),
            "not-affine",
            f"{member.path} does something else than normalise and call its submodules in a row",
            evidence=tuple(recording.described(call) for call in flowing(recording, visit)),
            remedy=_TEACH,
        )

    def _moved(self, value: int, visit: Visit) -> int | None:
        readers = self.recording.readers(value)
        if value in visit.gives or len(readers) != 1 or readers[0].number not in visit.calls:
            return None
        return readers[0].makes[0] if readers[0].name in MOVES else None

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
            evidence=self._all(others),
            remedy=_ALONE,
        )
        raise NotFoldable(
            "multiple-consumers",
            f"{member.path} is not the only one to read what {before.path} gives",
            evidence=self._all(others),
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
        return ", ".join(dict.fromkeys(self._all(readers))) or "nobody"

    def source(self, value: int) -> str:
        """What made a value, in words, moves left out."""
        while (call := self.recording.maker(value)) is not None and call.name in MOVES:
            value = call.reads[0]
        if call is not None:
            return self.recording.described(call)
        return self.recording.values[value].name or "outside of the model"

    def _same_channels(
        self, layer: Member, sites: Sequence[Site], norm: Member, reached: Sequence[Site]
    ) -> None:
        """Labels on the layer's output channels have to meet the same labels on the norm's vectors."""
        recording = self.recording
        vectors = _shapes(norm) | {f"{layer.path}.bias": shape for shape in _bias_shape(layer)}
        for site, target in zip(sites, reached, strict=True):
            shape = recording.values[site.exit or 0].shape
            if 0 in shape:
                continue  # an empty batch shows nothing, which the proof will say
            visit = recording.visits_of(norm.path)[target.visit]
            inside = flowing(recording, visit)
            last = next((call for call in reversed(inside) if call.name in NORMS), inside[-1])
            seeds = channel_seeds(recording, site, vectors)
            try:
                labels = labels_at(recording, last.makes[0], seeds)
            except LookupError as op:
                raise NotFoldable(
                    "bn-axis", f"the channels of {layer.path} cannot be followed to {norm.path}: {op}"
                ) from None
            require(
                labels is not None and not bool((labels == CONFLICT).any()),
                "bn-axis",
                f"the channels that {norm.path} normalises are not the output channels of {layer.path}",
                evidence=(
                    f"{layer.path} gives {self._given(layer, site)}, {norm.path} takes "
                    f"{list(recording.values[target.entry or 0].shape)} and normalises axis 1",
                ),
                remedy="leave the group out: this norm is no function of the layer's output channels",
            )

    def _given(self, layer: Member, site: Site) -> list[int]:
        gives = self.recording.visits_of(layer.path)[site.visit].gives
        return list(self.recording.values[gives[0] if gives else site.exit or 0].shape)

    def _all(self, calls: Sequence[Call]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.recording.described(call) for call in calls))


def _uses_batch(call: Call) -> bool:
    if call.name in ALWAYS_BATCH:
        return True
    position = NORMS.get(call.name)
    return position is not None and position < len(call.args) and call.args[position] is True


def _shapes(norm: Member) -> dict[str, tuple[int, ...]]:
    tensors = {**norm.module._parameters, **norm.module._buffers}
    return {f"{norm.path}.{name}": tuple(t.shape) for name, t in tensors.items() if t is not None}


def _bias_shape(layer: Member) -> list[tuple[int, ...]]:
    bias = layer.module._parameters.get("bias")
    return [] if bias is None else [tuple(bias.shape)]
