"""Discovery: what feeds every norm of the model, and so what can be fused, or why it cannot.

It only proposes; the plan decides, by the same audit as for a group that somebody has written down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from fusecli.engine.audit import Audit
from fusecli.engine.decisions import Decision, Group, Member, Plan, Vocabulary, refusal
from fusecli.engine.idle import idle_modules
from fusecli.engine.known import Known
from fusecli.engine.planning import plan
from fusecli.engine.uses import Uses
from fusecli.engine.walks import owner_of
from fusecli.engine.waves import TELLING, Search
from fusecli.errors import NotFoldable, require
from fusecli.graph.dataflow import Call
from fusecli.graph.kinds import LAYER_KINDS, NORM_KINDS, without_statistics
from fusecli.graph.ops import AVERAGES, BATCH_DEPENDENT, JOINS, NORMS, SUMS
from fusecli.graph.record import Run
from fusecli.graph.sites import moved_from, weight_of
from fusecli.outcome import Refusal, Unfused
from fusecli.plain import some
from fusecli.rewrite import ModuleTree

Target = Literal["inference", "quant"]
_CROSSED = JOINS | SUMS | AVERAGES  # what a whole norm may be folded across


@dataclass(frozen=True)
class Offer:
    """What the dataflow offers: a plan of sound groups, and every norm that is left, with the reason.

    operator_residual  layers to whose output an operator adds their own input: as a module it could become
          part of them
    idle  modules that do nothing at inference
    parts for a group that is no chain the chains in it, which hold without the rest
    """

    plan: Plan = field(default_factory=Plan)
    left: tuple[Unfused, ...] = ()
    operator_residual: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    parts: Mapping[tuple[str, ...], tuple[Group, ...]] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(decision.group for decision in self.plan.decisions)


def discover(
    tree: ModuleTree,
    run: Run,
    vocabulary: Vocabulary | None = None,
    *,
    listed: Sequence[Group] = (),
    excluded: Callable[[str], bool] = lambda _: False,
    target: Target = "inference",
) -> Offer:
    """What can be fused besides the groups in `listed`.

    target  "inference": norms are folded, nothing else moves; "quant": a ReLU goes into a container too
    """
    vocabulary = vocabulary or Vocabulary()
    taken = {path for group in listed for path in group.modules}
    search = _Search(Audit(run, tree, vocabulary), taken, excluded)
    groups, left = search.pairs()
    offered = _offered(tree, groups, listed, vocabulary, run)
    if target == "quant":
        longer = search.with_activations(offered.decisions)
        refused, offered = offered.refused, _offered(tree, longer, listed, vocabulary, run)
        offered = replace(offered, refused=(*refused, *offered.refused))
    if vocabulary.mode == "folded":
        offered = search.widened(offered, left, lambda found: _offered(tree, found, listed, vocabulary, run))
    for no in offered.refused:
        left[no.group[-1]] = _unfused(search.audit.member(no.group[-1]), no)
        if no.code == "other-path":  # the norm may stand before the layers that it would go into
            members = [search.audit.member(path) for path in no.group]
            stay = [member for member in members if member.kind in (*NORM_KINDS, "batch_dependent")]
            left |= {member.path: _unfused(member, no) for member in stay}
    fused = {path for decision in offered.decisions for path in decision.members}
    held = {
        path
        for group in (*listed, *(decision.group for decision in offered.decisions))
        for path in group.modules
    }
    idle = tuple(p for p in idle_modules(search.audit) if p not in held and not excluded(p))
    named = [unfused for path, unfused in left.items() if path not in fused]
    return Offer(
        replace(offered, refused=()), (*named, *search.functional()), tuple(search.bare), idle, search.parts
    )


def _offered(
    tree: ModuleTree, groups: Sequence[Group], listed: Sequence[Group], vocabulary: Vocabulary, run: Run
) -> Plan:
    """The plan of `groups`: together with those that are listed, with which they may share a norm."""
    together = plan(tree, [*listed, *groups], vocabulary, run)
    ours = {group.modules for group in groups}
    found = [decision for decision in together.decisions if decision.group.modules in ours]
    refused = [no for no in together.refused if no.group in ours]
    if not vocabulary.same_path:
        refused += [_on_one_path(decision) for decision in found if decision.unrun]
        found = [decision for decision in found if not decision.unrun]
    return Plan(tuple(found), tuple(refused))


def _on_one_path(decision: Decision) -> Refusal:
    """Why a fold is not offered that other inputs may need otherwise."""
    no = NotFoldable(
        "other-path",
        f"inputs that go to {some(decision.unrun)} may need it as it is, and none did",
        evidence=tuple(f"{path} did not run" for path in decision.unrun[:3]),
        remedy="give inputs that run them, or say --assume-same-path if no input ever does",
    )
    return refusal(decision.group, no, decision.rule)


@dataclass
class _Search:
    audit: Audit
    taken: set[str]
    excluded: Callable[[str], bool]
    bare: list[str] = field(default_factory=list)
    parts: dict[tuple[str, ...], tuple[Group, ...]] = field(default_factory=dict)

    def pairs(self) -> tuple[list[Group], dict[str, Unfused]]:
        """For every norm the layers that feed it, as groups; or why there are none."""
        groups: list[Group] = []
        left: dict[str, Unfused] = {}
        for member in self._members():
            if member.kind not in (*NORM_KINDS, "batch_dependent"):
                continue
            if member.path in self.taken:
                groups += self._rest(member)
                continue
            try:
                groups += self._groups(member)
            except NotFoldable as no:
                no = self._around(member) or no if no.code == "not-affine" else no
                left[member.path] = Unfused(
                    member.path, type(member.module).__name__, no.code, no.reason, no.evidence, no.remedy
                )
        return groups, left

    def _around(self, norm: Member) -> NotFoldable | None:
        """Why a norm whose class is accused would stay whatever its class, for what stands around it: to
        teach the class would be in vain."""
        recording = self.audit.recording
        for visit in recording.visits_of(norm.path):
            readers = [call for value in visit.gives for call in recording.readers(value)]
            if readers and all(weight_of(call) is not None for call in readers):
                continue  # the layers behind it could take it over
            for value in visit.takes:
                others = [call for call in recording.readers(value) if call.number not in visit.calls]
                added = bool(readers) and all(call.name in SUMS for call in readers)
                if others and added and all(weight_of(call) is not None for call in others):
                    continue  # parallel layers and a norm are folded to one layer
                if others and self._producer(value) is not None:
                    said = f"{norm.path} is not the only one to read what feeds it"
                    evidence = tuple(recording.described(call) for call in others[:3])
                    return NotFoldable("multiple-consumers", said, evidence=evidence)
                maker = self._producer(value)
                if maker is None or maker.name not in _CROSSED:
                    try:
                        self._layer(norm.path, value)
                    except NotFoldable as no:
                        return no
        return None

    def _rest(self, norm: Member) -> list[Group]:
        """The layers that feed a norm besides those that are listed with it: it folds into all or none."""
        try:
            sites = self.audit.norm_sites(norm)
            calls = [self._producer(site.entry) for site in sites if site.entry is not None]
            layers = dict.fromkeys(self._owner(call) for call in calls if call is not None)
        except NotFoldable:
            return []
        if any(layer and self.excluded(layer) for layer in layers):
            return []
        return [Group((layer, norm.path)) for layer in layers if layer and layer not in self.taken]

    def _members(self) -> Iterator[Member]:
        seen: set[int] = set()
        for path, module in self.audit.tree.modules.items():
            if path and id(module) not in seen:
                seen.add(id(module))
                yield self.audit.member(path)

    def _groups(self, norm: Member) -> Iterator[Group]:
        path = norm.path
        missing = without_statistics(norm.module)
        require(missing is None, *(missing or ("no-statistics", "")))
        require(not self.excluded(path), "excluded", "an exclude pattern of the spec covers it")
        layers = {self._layer(path, site.entry): None for site in self.audit.norm_sites(norm)}
        return (Group((layer, path)) for layer in layers)

    def _layer(self, norm: str, value: int | None) -> str:
        """The layer that gives `value`; raises NotFoldable where no layer does."""
        assert value is not None
        call = self._producer(value)
        source = self.audit.source(value) if call is None else self.audit.recording.described(call)
        owner = self._owner(call) if call is not None else None
        require(
            owner is not None,
            "no-linear-producer",
            f"what feeds it is no layer that it could be folded into: {source}",
            evidence=(f"{norm} reads what comes from {source}",),
        )
        assert owner is not None
        require(not self.excluded(owner), "excluded", f"an exclude pattern of the spec covers {owner}")
        require(
            owner not in self.taken,
            "multiple-consumers",
            f"{owner}, which feeds it, is in another group",
            evidence=(f"{norm} reads what comes from {source}",),
        )
        return owner

    def _producer(self, value: int) -> Call | None:
        """The op that made `value`, moves and the addition of a constant bias left out."""
        recording = self.audit.recording
        while (call := recording.maker(value := moved_from(recording, value))) is not None:
            flowing = [read for read in call.reads if not recording.values[read].constant]
            if call.name not in SUMS or len(flowing) != 1:
                return call
            value = flowing[0]
        return None

    def _owner(self, call: Call) -> str | None:
        """The layer whose weight the op applies; raises NotFoldable where the weight is made in the run."""
        weight = weight_of(call)
        if weight is None:
            return None
        owner = owner_of(self.audit, call)
        if owner is not None:
            return owner
        origins = self.audit.recording.values[weight].origins
        owners = {name.rpartition(".")[0] for name in origins}
        computed = {path.partition(".parametrizations.")[0] for path in owners}
        if len(computed) == 1 and computed != owners:
            raise NotFoldable(
                "parametrized",
                f"the weight of {computed.pop()}, which feeds it, is computed by a parametrization",
                evidence=tuple(sorted(origins)[:3]),
                remedy="say `bake: true` in the spec, or --bake: it is made plain first",
            )
        raise NotFoldable(
            "derived-weight",
            "the weight of the layer before it is computed in forward",
            evidence=(self.audit.recording.described(call), *sorted(origins)[:3]),
            remedy="store the weight it is computed to, as a plain parameter",
        )

    def widened(
        self, offered: Plan, left: dict[str, Unfused], planned: Callable[[Sequence[Group]], Plan]
    ) -> Plan:
        """With what is no chain: a chain that takes part in it becomes part of that group."""
        chains = [decision.group for decision in offered.decisions]
        folded = [path for group in chains for path in group.modules]
        search = Search(
            Known(self.audit, Uses(self.audit.tree)),
            self._may,
            strict=True,
            rules=self.audit.vocabulary.rules,
            restructure=self.audit.vocabulary.restructure,
            clone=self.audit.vocabulary.clone,
        )
        parts = [{path for step in wave for path in step.paths} for wave in search.waves(folded)]
        self.bare = search.bare
        for path, no in search.refused.items():
            if path in left and no.code in TELLING:
                member = self.audit.member(path)
                left[path] = _unfused(member, refusal(Group((path,)), no))
            elif path in left and left[path].code == "batch-dependent":
                left[path] = replace(left[path], evidence=(f"its gain stays too: {no.code}: {no.reason}",))
        joined = list(self._joined(chains, parts))
        if not joined:
            return offered
        taken = {path for group in joined for path in group.modules}
        whole = planned([*(chain for chain in chains if not taken & set(chain.modules)), *joined])
        pending = [no for no in whole.refused if no.code == "other-path"]
        if failed := {path for no in whole.refused for path in no.group}:
            # What does not hold together is left as the chains that it was made of.
            again = [decision.group for decision in whole.decisions]
            back = [c for c in chains if c not in again and failed & set(c.modules)]
            whole = planned([*again, *back])
        self.parts = {
            decision.group.modules: tuple(c for c in chains if set(c.modules) <= set(decision.group.modules))
            for decision in whole.decisions
            if decision.group in joined
        }
        pending = [no for no in pending if no not in whole.refused]
        return replace(whole, refused=(*offered.refused, *whole.refused, *pending))

    def _joined(self, chains: Sequence[Group], parts: Sequence[set[str]]) -> Iterator[Group]:
        """Parts that share modules, with each other or with chains, as one group in the order of the run."""
        pools: list[set[str]] = []
        acting = [{p for p in group.modules if self.audit.member(p).kind != "relu"} for group in chains]
        for part in parts:
            together = set(part).union(*(chain for chain in acting if chain & part))
            touching = [pool for pool in pools if pool & together]
            pools = [pool for pool in pools if not pool & together] + [together.union(*touching)]
        for pool in pools:
            yield Group(tuple(sorted(pool, key=lambda path: (self.audit.start(path), path))))

    def _may(self, path: str) -> bool:
        return path not in self.taken and not self.excluded(path)

    def with_activations(self, decisions: Collection[Decision]) -> list[Group]:
        """The groups with the ReLU that follows each, and ReLUs that follow a layer or a norm alone."""
        given: dict[int, tuple[str, ...]] = {}
        fused = {path: decision.group.modules for decision in decisions for path in decision.members}
        for member in self._members():
            if member.kind in (*LAYER_KINDS, *NORM_KINDS) and member.path not in self.taken:
                group = fused.get(member.path, (member.path,))
                if group[-1] == member.path and not self.excluded(member.path):
                    for visit in self.audit.recording.visits_of(member.path):
                        given |= dict.fromkeys(visit.gives, group)
        longer: dict[tuple[str, ...], Group] = {}
        for member in self._members():
            visits = self.audit.recording.visits_of(member.path) if member.kind == "relu" else []
            sources = {given.get(visit.takes[0]) for visit in visits if visit.takes}
            source = sources.pop() if len(sources) == 1 else None
            if source is not None and source not in longer and not self.excluded(member.path):
                longer[source] = Group((*source, member.path))
        offered = plan(self.audit.tree, longer.values(), self.audit.vocabulary, self.audit.run)
        taking = {
            decision.group.modules[:-1]: decision.group for decision in offered.decisions if not decision.kept
        }
        plain = [decision.group for decision in decisions]
        return [taking.pop(group.modules, group) for group in plain] + list(taking.values())

    def functional(self) -> Iterator[Unfused]:
        """Norms that are computed by a function call: no module can be taken out for them."""
        audit = self.audit
        for call in audit.recording.calls:
            if (
                not (call.name in NORMS or call.name in BATCH_DEPENDENT)
                or not audit.recording.alive[call.number]
            ):
                continue
            read = (audit.recording.values[value].name.rpartition(".")[0] for value in call.reads)
            if audit.norm_around(call) is None and not any(
                path in audit.recording.held for path in read if path
            ):
                place = audit.recording.inside(call)
                kind = f"function {call.name.partition('.')[2]}"
                yield Unfused(place or "(the model)", kind, *self._functional_reason(call))

    def _functional_reason(self, call: Call) -> tuple[str, str]:
        if call.name in BATCH_DEPENDENT:
            return "batch-dependent", "it normalises by the statistics of each input"
        if self.audit.recording.values[call.reads[0]].constant:
            return "norm-on-weights", "it normalises weights, not activations"
        return "functional-norm", "a function call computes it, there is no norm module to take out"


def _unfused(member: Member, no: Refusal) -> Unfused:
    return Unfused(member.path, type(member.module).__name__, no.code, no.reason, no.evidence, no.remedy)
