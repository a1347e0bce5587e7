"""Which groups are fused: those of the spec, and what the dataflow offers; and an account of every norm.

What only a run can tell of a source is found out here: which of its modules need a copy of their own, and
which of its computed layers can be plain.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import nn

from fusecli.bisect import failing
from fusecli.engine import Decision, Group, Offer, computed_layers, discover, needed, plan, shared_roots
from fusecli.errors import Problem, UsageError
from fusecli.graph.kinds import LAYER_KINDS, is_norm, norms, without_statistics
from fusecli.graph.record import Run
from fusecli.outcome import Refusal, Unfused
from fusecli.pipeline.fold import still_computed
from fusecli.pipeline.record import record
from fusecli.plain import some
from fusecli.rewrite import ModuleTree
from fusecli.sample import Sample
from fusecli.source.source import Source, Structure
from fusecli.spec import Spec
from fusecli.spec.names import NameTree

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


@dataclass(frozen=True)
class Selection:
    """The groups of one fuse of `source`, planned on `structure`.

    run      what shows them; None where nobody has the model's code
    asked    the spec's own: if one of them is refused, nothing is done
    offer    what the run shows besides; None where nothing was recorded
    taking   whether the offer is taken, or only accounted for
    standalone  computed layers that are made plain where no group has them
    required those of them that nobody may leave out
    removing whether modules that do nothing become identities
    dropped  groups that were left out on the way, and why
    keep_going  whether what was asked for may be left out too, once it has failed the proof
    stored   the model with nothing unshared or made plain yet; None: `structure` is that
    """

    source: Source
    structure: Structure
    run: Run | None = None
    asked: tuple[Group, ...] = ()
    offer: Offer | None = None
    taking: bool = False
    standalone: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()
    removing: bool = False
    dropped: Mapping[tuple[str, ...], Refusal] = field(default_factory=dict)
    keep_going: bool = False
    stored: Structure | None = None

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """The modules of the model, each by its first name."""
        return dict(self.structure.model.named_modules())

    @property
    def groups(self) -> list[Group]:
        groups = [group for group in (*self.asked, *self._offered()) if group.modules not in self.dropped]
        if self.removing and self.offer is not None:
            idle = [Group((path,)) for path in self.offer.idle]
            groups += [group for group in idle if group.modules not in self.dropped]
        held = {path for group in groups for path in group.modules}
        single = [(path,) for path in self.standalone if path not in held]
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
    def operator_residual(self) -> tuple[str, ...]:
        """Layers to whose output an operator adds their own input."""
        return self.offer.operator_residual if self.offer is not None and self.taking else ()

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

    def without(self, refused: Iterable[Refusal]) -> Selection:
        """The selection that leaves these groups out."""
        return replace(self, dropped={**self.dropped, **{refusal.group: refusal for refusal in refused}})

    @property
    def fell_short(self) -> bool:
        """Whether a group that somebody has asked for failed the proof."""
        return not self._unasked([no for no in self.dropped.values() if no.code == "dropped"])

    def may_drop(self, refused: Iterable[Refusal]) -> bool:
        """Whether these may be left out, as no fold of them can be made."""
        return self._unasked(refused) or (self.keep_going and bool(self.dropped))

    def may_leave(self, failed: Iterable[Refusal]) -> bool:
        """Whether these may be left out, as the proof has found them wrong."""
        return self._unasked(failed) or self.keep_going

    def _unasked(self, refused: Iterable[Refusal]) -> bool:
        """Whether nobody has asked for these groups: what was only discovered may turn out to be unsound."""
        asked = {group.modules for group in self.asked} | {(path,) for path in self.required}
        return all(refusal.group not in asked for refusal in refused)

    def unfused(
        self, decisions: Iterable[Decision] = (), refused: Iterable[Refusal] = ()
    ) -> tuple[Unfused, ...]:
        """Every norm that stays in the model, and why."""
        taken = {path for decision in decisions for path in decision.members}
        left = self._left(taken, list(refused))
        return tuple(still_computed(one, self.source.unbakeable) for one in left)

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


def select(
    spec: Spec, source: Source, structure: Structure, run: Run | None, asked: Sequence[Group]
) -> Selection:
    """The groups of the spec, and what the run offers besides. A model that does not run offers nothing."""
    selection = Selection(source, structure, run, tuple(asked), required=_adapted(source))
    if run is None:
        if spec.discover:
            fix = "give --model and --input, or model and inputs in the spec"
            raise UsageError(Problem("discovery runs the model, and its code is not known", "discover", fix))
        return selection
    names = NameTree(structure.names, spec.exclude)
    target = "quant" if spec.qat else spec.target  # containers are all that training asks for
    try:
        offer = discover(
            structure.tree, run, source.vocabulary, listed=asked, excluded=names.excluded, target=target
        )
    except UsageError:
        if spec.discover:
            raise
    else:
        selection = replace(selection, offer=offer, taking=spec.discover, removing=spec.remove_idle)
    return replace(selection, standalone=_standalone(selection, run))


def record_and_select(
    spec: Spec,
    source: Source,
    structure: Structure,
    sample: Sample,
    asked: Sequence[Group],
    others: Callable[[], Sequence[Sample]] = tuple,
) -> Selection:
    """The groups as a run on `sample` shows them, in a source whose modules are unshared and whose computed
    layers are plain as far as that run wants it.

    others   the further samples that the proof will have
    """
    stored = structure
    if bakes := _bakes(spec, source, structure.tree):
        source = _bakeable(replace(source, bakes=bakes), sample)
        structure = source.structure()
    if spec.shared == "clone" and (roots := shared_roots(structure.tree, source.vocabulary)):
        source = _unshared(spec, source, roots, sample, asked, others)
        structure = source.structure()
    run = record(source, structure, sample, others)
    selection = select(spec, source, structure, run, asked)
    if selection.offer is not None:
        source.require_unwritten(run.recording)
    return replace(selection, stored=stored)


def _unshared(
    spec: Spec,
    source: Source,
    roots: Sequence[str],
    sample: Sample,
    asked: Sequence[Group],
    others: Callable[[], Sequence[Sample]],
) -> Source:
    """The source with a copy for each name that can be folded where all `roots` have one; the others stay
    tied."""
    apart = replace(source, unshared=tuple(roots))
    structure = apart.structure()
    run = record(apart, structure, sample, others)
    selection = select(spec, apart, structure, run, asked)
    sound = plan(structure.tree, selection.groups, source.vocabulary, run).decisions
    single = [group.modules[0] for group in asked if len(group.modules) == 1]
    return replace(source, unshared=tuple(needed(roots, sound, [*selection.standalone, *single])))


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


def _bakeable(source: Source, sample: Sample) -> Source:
    """The source without those plain layers that forward needs as they are: it reads what their weight is
    computed from, and does not run when that is gone."""
    wanted = source.bakes
    told = ""

    def runs(paths: Iterable[str]) -> bool:
        nonlocal told
        part = replace(source, bakes={path: wanted[path] for path in paths})
        try:
            _ = record(part, part.structure(), sample).recording
        except UsageError as error:
            told = error.problems[0].what
            return False
        return True

    adapters = [path for path in wanted if wanted[path] == "lora"]
    if runs(wanted) or not runs(adapters):
        return source
    found = [*failing([path for path in wanted if path not in adapters], runs)]
    kept = {path: rule for path, rule in wanted.items() if path not in found}
    return replace(source, bakes=kept, unbakeable=dict.fromkeys(found, told))


def _adapted(source: Source) -> frozenset[str]:
    """The layers that an adapter is added to: a model without a part of it is another model."""
    return frozenset(path for path, rule in source.bakes.items() if rule == "lora")


def _standalone(selection: Selection, run: Run) -> tuple[str, ...]:
    """Layers that are made plain though no group takes them: an adapter's, and where the choice is free those
    that the run has called."""
    source, modules = selection.source, selection.modules
    must, kind = _adapted(source), source.vocabulary.kind
    return tuple(
        path
        for path in source.bakes
        if path in must
        or (selection.taking and kind(modules[path]) in LAYER_KINDS and run.recording.visits_of(path))
    )


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
