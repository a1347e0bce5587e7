"""Which groups are fused: those of the spec, and what the dataflow offers; and an account of every norm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from fusecli.engine import (
    Decision,
    Group,
    Offer,
    Vocabulary,
    computed_layers,
    discover,
    needed,
    plan,
    shared_roots,
)
from fusecli.errors import Problem, UsageError
from fusecli.graph.kinds import LAYER_KINDS, is_norm, norms, without_statistics
from fusecli.graph.record import Run
from fusecli.jobs.fold import Fold, Refused, plan_fold, still_computed
from fusecli.jobs.source import Source
from fusecli.outcome import Refusal, Unfused
from fusecli.plain import some
from fusecli.rewrite import ModuleTree
from fusecli.sample import Sample
from fusecli.spec import Spec
from fusecli.spec.names import NameTree

_Made = TypeVar("_Made")
# A norm that is left for one of these reasons could have been folded.
FOLDABLE_LEFT = frozenset({"not-listed", "excluded", "held-back"})
# What a function call computes is counted, but for what keeps no statistics.
_NO_STATISTICS = frozenset({"batch-dependent", "no-statistics", "norm-on-weights"})
# Containers of a norm that stays in them.
_STAYS = frozenset({"bn_relu"})


@dataclass(frozen=True)
class Counted:
    """The norms with running statistics: how many are folded, how many are `staying` in a container that
    somebody has asked for, and those that are left."""

    folded: int
    staying: int
    left: Sequence[Unfused]

    @property
    def total(self) -> int:
        return self.folded + self.staying + len(self.left)


@dataclass
class Choice:
    """The groups of one fuse.

    asked    the spec's own: if one of them is refused, nothing is done
    offer    what the run shows besides; None where nothing was recorded
    taking   whether the offer is taken, or only accounted for
    alone    computed layers that are made plain where no group has them
    musts    those of them that nobody may leave out
    removing whether modules that do nothing become identities
    unbakeable  layers that stay computed, and what happens with plain ones
    dropped  groups that were left out on the way, and why
    """

    modules: Mapping[str, nn.Module]
    asked: Sequence[Group]
    offer: Offer | None = None
    taking: bool = False
    alone: Sequence[str] = ()
    musts: frozenset[str] = frozenset()
    removing: bool = False
    unbakeable: Mapping[str, str] = field(default_factory=dict)
    dropped: dict[tuple[str, ...], Refusal] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        groups = [group for group in (*self.asked, *self._offered()) if group.modules not in self.dropped]
        if self.removing and self.offer is not None:
            idle = [Group((path,)) for path in self.offer.idle]
            groups += [group for group in idle if group.modules not in self.dropped]
        held = {path for group in groups for path in group.modules}
        single = [(path,) for path in self.alone if path not in held]
        return groups + [Group(modules) for modules in single if modules not in self.dropped]

    def _offered(self) -> Iterator[Group]:
        """What the run offers; in place of a group that was dropped the chains in it."""
        offer = self.offer if self.taking else None
        for group in offer.groups if offer is not None else ():
            yield group
            if offer is not None and group.modules in self.dropped:
                yield from offer.parts.get(group.modules, ())

    @property
    def idle(self) -> tuple[str, ...]:
        """Modules that do nothing at inference, and stay as they are."""
        offered = self.offer.idle if self.offer is not None else ()
        return tuple(path for path in offered if (path,) not in {group.modules for group in self.groups})

    @property
    def bare(self) -> tuple[str, ...]:
        """Layers to whose output an operator adds their own input."""
        return self.offer.bare if self.offer is not None and self.taking else ()

    @property
    def norms(self) -> list[str]:
        """Every norm module of the model, by its first name."""
        return [path for path, _ in norms(self.modules)]

    @property
    def names(self) -> list[str]:
        """Every module of every group."""
        return [path for group in self.groups for path in group.modules]

    def counted(self, unfused: Iterable[Unfused], decisions: Sequence[Decision] = ()) -> Counted:
        """The norms with running statistics, and what becomes of them. A LayerNorm, of which nothing but the
        gain is ever folded, is none of them."""

        def taken(stays: bool) -> set[str]:
            members = (path for d in decisions if (d.rule in _STAYS) is stays for path in d.members)
            return {path for path in members if path in self.modules and self._keeps_statistics(path)}

        folded = taken(False)
        return Counted(len(folded), len(taken(True) - folded), [*filter(self._counts, unfused)])

    def _counts(self, left: Unfused) -> bool:
        if left.functional or left.module not in self.modules:
            return left.code not in _NO_STATISTICS
        return self._keeps_statistics(left.module)

    def _keeps_statistics(self, path: str) -> bool:
        return is_norm(self.modules[path]) and without_statistics(self.modules[path]) is None

    def drop(self, refused: Iterable[Refusal]) -> None:
        self.dropped |= {refusal.group: refusal for refusal in refused}

    @property
    def fell_short(self) -> bool:
        """Whether a group that somebody has asked for failed the proof."""
        return not self.may_drop([no for no in self.dropped.values() if no.code == "dropped"])

    def may_drop(self, refused: Iterable[Refusal]) -> bool:
        """Whether nobody has asked for these groups: what was only discovered may turn out to be unsound."""
        asked = {group.modules for group in self.asked} | {(path,) for path in self.musts}
        return all(refusal.group not in asked for refusal in refused)

    def unfused(
        self, decisions: Iterable[Decision] = (), refused: Iterable[Refusal] = ()
    ) -> tuple[Unfused, ...]:
        """Every norm that stays in the model, and why."""
        taken = {path for decision in decisions for path in decision.members}
        left = self._left(taken, list(refused))
        return tuple(still_computed(one, self.unbakeable) for one in left)

    def _left(self, taken: Collection[str], refused: Sequence[Refusal]) -> Iterator[Unfused]:
        blocked = {path: no for no in (*refused, *self.dropped.values()) for path in no.group}
        held = {path for group in self.groups for path in group.modules}
        offer = self.offer or Offer()
        known = {unfused.module: unfused for unfused in offer.left if not unfused.functional}
        offered = {path: group for group in offer.groups for path in group.modules}
        for path, norm in norms(self.modules):
            kind = type(norm).__name__
            if path in taken:
                continue
            if path in blocked:
                no = blocked[path]
                yield Unfused(path, kind, no.code, no.reason, no.evidence, no.remedy)
            elif path in held:
                yield Unfused(path, kind, "held-back", "its group was not refused, but another one was")
            elif path in known:
                yield known[path]
            elif path in offered:
                group = ", ".join(offered[path].modules)
                yield Unfused(
                    path, kind, "not-listed", "no group of the spec names it", (), f"[{group}] would fold it"
                )
            else:
                code, reason = without_statistics(norm) or ("not-listed", "no group of the spec names it")
                yield Unfused(path, kind, code, reason)
        yield from (unfused for unfused in offer.left if unfused.functional)


def chosen(
    spec: Spec,
    tree: ModuleTree,
    modules: Mapping[str, nn.Module],
    asked: Sequence[Group],
    run: Run | None,
    vocabulary: Vocabulary,
) -> Choice:
    """The groups of the spec, and what the run offers besides. A model that does not run offers nothing."""
    if run is None:
        if spec.discover:
            fix = "give --model and --input, or model and inputs in the spec"
            raise UsageError(Problem("discovery runs the model, and its code is not known", "discover", fix))
        return Choice(modules, asked)
    names = NameTree([path for path in tree.modules if path], spec.exclude)
    target = "quant" if spec.qat else spec.target  # containers are all that training asks for
    try:
        offer = discover(tree, run, vocabulary, listed=asked, excluded=names.excluded, target=target)
    except UsageError:
        if spec.discover:
            raise
        return Choice(modules, asked)
    return Choice(modules, asked, offer, taking=spec.discover, removing=spec.remove_idle)


def looked(
    spec: Spec,
    source: Source,
    structure: Callable[[], nn.Module],
    numbers: Callable[[], nn.Module],
    sample: Sample,
    asked: Sequence[Group],
    *,
    others: Callable[[], Sequence[Sample]] = tuple,
) -> tuple[nn.Module, Run, Choice]:
    """The model as it will be planned on, a run of it on `sample`, and the groups.

    structure  makes that model, with copies of what `source.owns` names and plain layers for `source.bakes`:
               this is where it is found out which modules need either
    numbers    makes the same, to be run
    others     the further samples that the proof will have
    """
    model = structure()
    source.bakes = _bakes(spec, source, ModuleTree(model))
    if source.bakes:
        model = _without_unbakeable(source, structure, numbers, sample)
    if spec.shared == "clone":
        source.owns = shared_roots(ModuleTree(model), source.vocabulary)
        if source.owns:
            apart = Run(structure(), sample, numbers, others)
            tree, modules = ModuleTree(apart.structure), dict(apart.structure.named_modules())
            choice = chosen(spec, tree, modules, asked, apart, source.vocabulary)
            sound = plan(tree, choice.groups, source.vocabulary, apart).decisions
            alone = [*_alone(source, choice, apart), *(g.modules[0] for g in asked if len(g.modules) == 1)]
            source.owns = needed(source.owns, sound, alone)  # the others stay tied
            model = structure()
    run = Run(model, sample, numbers, others)
    modules = dict(model.named_modules())
    choice = chosen(spec, ModuleTree(model), modules, asked, run, source.vocabulary)
    choice.alone = _alone(source, choice, run)
    choice.musts = adapted(source)
    choice.unbakeable = source.unbakeable
    source.require_unwritten(run)
    return model, run, choice


def _bakes(spec: Spec, source: Source, tree: ModuleTree) -> dict[str, str]:
    """The layers that are made plain: an adapter's, and with `bake: true` all that are not excluded."""
    found = computed_layers(tree, source.vocabulary)
    rules = source.vocabulary.rules
    if rules is not None and "lora" not in rules and "lora" in found.values():
        fix = "allow the rule, or take the adapter out of the spec"
        raise UsageError(
            Problem("an adapter is added by the rule 'lora', which is not allowed", "rules", fix)
        )
    names = NameTree([path for path in tree.modules if path], spec.exclude)
    return {
        path: rule
        for path, rule in found.items()
        if rule != "bake" or (spec.bake and not names.excluded(path) and (rules is None or "bake" in rules))
    }


def _without_unbakeable(
    source: Source,
    structure: Callable[[], nn.Module],
    numbers: Callable[[], nn.Module],
    sample: Sample,
) -> nn.Module:
    """The model with plain layers for `source.bakes`, without those that forward needs as they are: it reads
    what their weight is computed from, and does not run when that is gone."""
    wanted = source.bakes
    told = ""

    def runs(paths: Iterable[str]) -> bool:
        nonlocal told
        source.bakes = {path: wanted[path] for path in paths}
        try:
            _ = Run(structure(), sample, numbers).recording
        except UsageError as error:
            told = error.problems[0].what
            return False
        return True

    if not runs(wanted):
        try:
            if runs(path for path in wanted if wanted[path] == "lora"):
                found = list(_failing([path for path in wanted if wanted[path] != "lora"], runs))
                source.unbakeable = dict.fromkeys(found, told)
        finally:
            source.bakes = {path: rule for path, rule in wanted.items() if path not in source.unbakeable}
    return structure()


def _failing(paths: list[str], runs: Callable[[Iterable[str]], bool]) -> Iterator[str]:
    """Those with which it does not run, found by halves."""
    if not paths or runs(paths):
        return
    if len(paths) == 1:
        yield paths[0]
        return
    middle = len(paths) // 2
    yield from _failing(paths[:middle], runs)
    yield from _failing(paths[middle:], runs)


def adapted(source: Source) -> frozenset[str]:
    """The layers that an adapter is added to: a model without a part of it is another model."""
    return frozenset(path for path, rule in source.bakes.items() if rule == "lora")


def _alone(source: Source, choice: Choice, run: Run) -> list[str]:
    """Layers that are made plain though no group takes them: an adapter's, and where the choice is free those
    that the run has called."""
    must, kind = adapted(source), source.vocabulary.kind
    return [
        path
        for path in source.bakes
        if path in must
        or (choice.taking and kind(choice.modules[path]) in LAYER_KINDS and run.recording.visits_of(path))
    ]


def settled(
    source: Source, model: nn.Module, choice: Choice, run: Run, attempt: Callable[[Fold], _Made]
) -> tuple[Fold, _Made]:
    """The plan of the choice's groups, all of which `attempt` accepts, and what it makes of them; what nobody
    has asked for is dropped where it turns out to be unsound. Raises Refused for the others."""
    while True:
        try:
            fold = plan_fold(source, model, choice.groups, run)
            return fold, attempt(fold)
        except Refused as no:
            if not choice.may_drop(no.refused):
                raise
            choice.drop(no.refused)


def shortfall(counted: Counted, *, require_all: bool, min_folded: float | None) -> list[str]:
    """What --require-all and --min-folded have to say about the norms that are left."""
    problems = []
    left = [norm.module for norm in counted.left if norm.code in FOLDABLE_LEFT]
    if require_all and left:
        problems.append(f"--require-all: {len(left)} norms could be folded and are left: {some(left)}")
    percent = 100.0 * counted.folded / counted.total if counted.total else 100.0
    if min_folded is not None and percent < min_folded:
        problems.append(
            f"--min-folded {min_folded:g}: {counted.folded} of {counted.total} norms with running statistics "
            f"are folded, {percent:.1f} %"
        )
    return problems
