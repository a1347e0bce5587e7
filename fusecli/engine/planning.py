"""Plan: groups x rules -> decisions with reasons, without arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise

import torch
from torch import nn

from fusecli.engine.aliasing import Aliases
from fusecli.engine.audit import Audit, Found
from fusecli.engine.decisions import Decision, Group, Member, Modules, Plan, Vocabulary, refusal
from fusecli.engine.fusers import opaque
from fusecli.engine.idle import idle_decision, idle_modules
from fusecli.engine.inside import held_elsewhere, require_seen
from fusecli.engine.known import Known
from fusecli.engine.purpose import require_same_purpose
from fusecli.engine.steps import Wave
from fusecli.engine.uses import Uses
from fusecli.engine.waves import TELLING, Search, wide
from fusecli.errors import NotFoldable, Problem, UsageError, require
from fusecli.graph.kinds import FOLDABLE, LAYER_KINDS, NORM_KINDS, is_norm, without_statistics
from fusecli.graph.record import Run
from fusecli.outcome import Evidence, Mode, Refusal
from fusecli.proof.region import Region
from fusecli.rewrite import ModuleTree, Rewrite
from fusecli.rules import Rule, all_rules
from fusecli.rules._member import Member as Operand


def plan(
    tree: ModuleTree, groups: Iterable[Group], vocabulary: Vocabulary | None = None, run: Run | None = None
) -> Plan:
    """Chooses a rule for each group, without arithmetic: works on meta tensors.

    With a `run`, each group is audited against what it shows. Raises UsageError where a list is in the wrong
    order: that is a slip in the spec, not an unsound fold.
    """
    vocabulary = vocabulary or Vocabulary()
    planner = _Planner(tree, vocabulary, Uses(tree), Audit(run, tree, vocabulary) if run else None)
    return planner.plan(list(groups))


@dataclass
class _Planner:
    tree: ModuleTree
    vocabulary: Vocabulary
    uses: Uses
    audit: Audit | None
    _known: Known | None = None

    def plan(self, groups: Sequence[Group]) -> Plan:
        earlier = self.tree.rules_of_groups
        decided: list[tuple[Decision, Found | None]] = []
        refused: list[Refusal] = []
        done: list[Group] = []
        slips: list[Problem] = []
        for group in groups:
            modules = [self.tree[path] for path in group.modules]
            kinds = [self.vocabulary.kind(module) for module in modules]
            slip = None if self.vocabulary.fuser(modules) else _wrong_order(group, kinds)
            try:
                if group.modules not in earlier or any(map(is_norm, modules)):
                    decided.append(self._decide(group, modules))
                    continue
            except NotFoldable as no:
                if not _is_fused(modules):
                    # With a run at hand it may be a norm that feeds a layer, refused for another reason.
                    if slip and not self._runs_so(group):
                        slips.append(slip)
                    else:
                        refused.append(refusal(group, no))
                    continue
            try:
                rule = earlier.get(group.modules, "")
                require_same_purpose(group.modules, modules, rule, self.vocabulary.mode)
                done.append(group)
            except NotFoldable as no:
                refused.append(refusal(group, no))
        if slips:
            raise UsageError(*slips)
        decisions, uncovered = self._covered(decided)
        return Plan(tuple(decisions), (*refused, *uncovered), tuple(done))

    def _runs_so(self, group: Group) -> bool:
        """Whether the run calls the modules in the order of the list."""
        ran = self.audit is not None and all(map(self.audit.recording.visits_of, group.modules))
        return ran and self.audit is not None and _sorted(self.audit, group)

    def _decide(self, group: Group, modules: Sequence[nn.Module]) -> tuple[Decision, Found | None]:
        members = [
            Member(path, module, self.vocabulary.kind(module))
            for path, module in zip(group.modules, modules, strict=True)
        ]
        self._require_reached(group)
        for member in members:
            self._require_replaceable(member.path)
            if member.kind in FOLDABLE:
                self.uses.require_single(member.path, member.module)
        if self.audit is not None:
            require_seen(self.audit.recording, *group.modules)
        if custom := self.vocabulary.fuser(modules):
            found = self._observed(group, members, custom=True)
            rewrite = opaque(custom, group.modules, self.vocabulary.mode)
            decision = Decision(
                group, custom.name, rewrite, group.modules, custom=True, leaving=group.modules[1:]
            )
            return self._with(decision, found), found
        if self.vocabulary.mode == "qat":
            return self._chain(group, members)
        if self.audit is not None and group.modules[1:] == () and group.modules[0] in self._idle:
            return idle_decision(self.audit, group), None
        try:
            decision, found = self._chain(group, members)
        except NotFoldable as no:
            if self.audit is None or not self.audit.ran(group):
                raise
            return self._wide(self.audit, group, members, no), None
        if found is not None and (whole := self._with_the_kept(decision, members)) is not None:
            return whole, None
        return decision, found

    def _with_the_kept(self, chain: Decision, members: Sequence[Member]) -> Decision | None:
        """A decision that takes what a chain would leave where it is: a scale behind it, an identity beside
        it."""
        assert self.audit is not None
        kept = [member for member in members if member.path in chain.kept]
        if not any(type(m.module) is nn.Identity or m.kind not in ("relu", "nothing") for m in kept):
            return None
        try:
            whole = self._wide(self.audit, chain.group, members, NotFoldable("no-rule", ""))
        except NotFoldable:
            return None
        return whole if len(whole.members) > len(chain.members) else None

    def _wide(self, audit: Audit, group: Group, members: Sequence[Member], no: NotFoldable) -> Decision:
        """The decision for members that are no chain; raises the more telling of two refusals, of which `no`
        is that of the chain."""
        # What an artifact was made with is allowed where it is judged.
        made = [rule for rule in all_rules() if rule.name in (group.rules or ())]
        restructure = self.vocabulary.restructure or any(rule.restructures for rule in made)
        clone = self.vocabulary.clone or any(rule.clones for rule in made)
        mine, allowed = set(group.modules), self.vocabulary.may_use(group)
        search = Search(
            self.known(audit), mine.__contains__, rules=allowed, restructure=restructure, clone=clone
        )
        waves = search.waves()
        used = {path for wave in waves for step in wave for path in step.paths}
        left = [member.path for member in members if member.path not in used and member.kind != "nothing"]
        if left or not waves or not _in_order(audit, group, waves):
            # Of a norm that is listed first, the layers after it are what is asked for.
            below = search.below if members[0].kind not in LAYER_KINDS else {}
            known = {**search.refused, **below}
            said = [known[path] for path in left if path in known]
            kinds = {member.kind for member in members}
            # No rule takes a pooling, say: that is more to the point than what feeds the norm behind it.
            blunt = () if kinds & LAYER_KINDS or kinds <= FOLDABLE else _NOTHING_BESIDE
            telling = [
                one for one in said if one.code in TELLING or (no.code == "no-rule" and one.code not in blunt)
            ]
            raise telling[0] if telling else no
        return wide(audit.recording, group, waves, self.known(audit).shown)

    @cached_property
    def _idle(self) -> frozenset[str]:
        return frozenset(idle_modules(self.audit) if self.audit is not None else ())

    def known(self, audit: Audit) -> Known:
        if self._known is None:
            self._known = Known(audit, self.uses)
        return self._known

    def _chain(self, group: Group, members: Sequence[Member]) -> tuple[Decision, Found | None]:
        # An identity or a dropout between two members does nothing at inference; it stays where it is.
        acting = [member for member in members if not self._does_nothing(member)]
        rule, taken = _chosen(acting, self.vocabulary.may_use(group), self.vocabulary.mode)
        left_out: tuple[Refusal, ...] = ()
        try:
            found = self._observed(group, taken)
        except NotFoldable as no:
            # The norm folds all the same where only the activation behind it has to stay.
            kinds = tuple(m.kind for m in taken[:-1])
            shorter = _rule_for(kinds, self.vocabulary.may_use(group), self.vocabulary.mode)
            if no.code != "multiple-consumers" or taken[-1].kind != "relu" or shorter is None:
                raise
            left_out = (refusal(Group((taken[-1].path,), group.where), no, rule.name),)
            rule, taken = shorter, taken[:-1]
            found = self._observed(group, taken)
        self._follow(acting[len(taken) - 1 :], found)
        names = tuple(member.path for member in taken)
        kept = tuple(path for path in group.modules if path not in names)
        decision = Decision(
            group, rule.name, _by_rule(rule, taken), names, kept, left_out=left_out, leaving=names[1:]
        )
        return self._with(decision, found), found

    def _does_nothing(self, member: Member) -> bool:
        """A dropout does nothing at inference, and only there."""
        trains = self.vocabulary.mode == "qat"
        return member.kind == "nothing" and not (trains and type(member.module) is not nn.Identity)

    def _require_reached(self, group: Group) -> None:
        """Guard for modules that did not run, or so it seems: forward may have its own way to them."""
        if self.audit is None or self.audit.ran(group):
            return
        for path in group.modules:
            if (hold := self.audit.recording.held_by(path)) is not None:
                raise held_elsewhere(path, hold, (f"{path} did not run where it stands",))

    def _require_replaceable(self, path: str) -> None:
        ends = [i for i, letter in enumerate(path) if letter == "."]
        around = [path[:end] for end in (*ends, len(path))]
        scripted = [name for name in ("", *around) if isinstance(self.tree[name], torch.jit.ScriptModule)]
        if scripted:
            reason = f"{scripted[0] or 'the model'} is a scripted module, whose parts cannot be replaced"
            raise NotFoldable("scripted", reason, remedy="fuse the model before it is scripted")

    def _observed(self, group: Group, members: Sequence[Member], *, custom: bool = False) -> Found | None:
        """What the run shows of the group; None without one, or where it called none of the modules."""
        if self.audit is None or not self.audit.ran(group):
            return None
        return self.audit.group(members, custom=custom)

    def _follow(self, members: Sequence[Member], found: Found | None) -> None:
        """The members behind the last that is fused: each has to read what the one before it gives."""
        if self.audit is not None and found is not None:
            for before, kept in pairwise(members):
                self.audit.follows(before, kept)

    def _with(self, decision: Decision, found: Found | None) -> Decision:
        if found is None:
            return decision
        assert self.audit is not None
        return replace(
            decision,
            evidence=Evidence.OBSERVED,
            region=Region(self.audit.recording, decision.members, chain=True, turns=found.reached),
            caveats=found.caveats,
            shown=frozenset(decision.members[:1] if found.shown else ()),
        )

    def _covered(
        self, decided: Sequence[tuple[Decision, Found | None]]
    ) -> tuple[list[Decision], list[Refusal]]:
        """The decisions whose modules are called in their groups only; in the order of the run."""
        shares = Counter(path for decision, _ in decided for path in decision.members)
        reached: dict[str, frozenset[int]] = {}
        for _, found in decided:
            for path, turns in found.reached.items() if found else ():
                reached[path] = reached.get(path, frozenset()) | turns
        decisions: list[Decision] = []
        refused: list[Refusal] = []
        leaving = {path for decision, _ in decided for path in decision.leaving}
        aliases = Aliases(self.audit.recording, leaving) if self.audit is not None else None
        for decision, found in decided:
            no = self._shared(decision, shares) or (self._missed(found, reached) if found else None)
            no = no or (_overwritten(decision, aliases, leaving) if aliases is not None else None)
            if no is None:
                decisions.append(decision)
            else:
                refused.append(refusal(decision.group, no, decision.rule))
        if self.audit is not None:
            decisions.sort(key=lambda decision: self._start(decision))
            decisions = [replace(d, unrun=self._unrun(d)) for d in decisions]
        return decisions, refused

    def _shared(self, decision: Decision, shares: Mapping[str, int]) -> NotFoldable | None:
        """A norm may end several groups, each takes a copy of it; nothing else can be in two places."""
        for path in decision.members:
            if shares[path] < 2:
                continue
            module = self.tree[path]
            if module._forward_hooks or module._forward_pre_hooks:
                reason = f"{path} has hooks, which cannot follow it into several layers"
                return NotFoldable("shared-module", reason, remedy="take the hooks off first")
            if self.vocabulary.kind(module) not in NORM_KINDS:
                reason = f"{path} ends several groups, and only a norm can"
                return NotFoldable("shared-module", reason, remedy="leave it out of all of them")
        return None

    def _missed(self, found: Found, reached: Mapping[str, frozenset[int]]) -> NotFoldable | None:
        assert self.audit is not None
        missed = (self.audit.missed(path, reached[path]) for path in found.reached)
        return next((no for no in missed if no is not None), None)

    def _unrun(self, decision: Decision) -> tuple[str, ...]:
        assert self.audit is not None
        return self.audit.unrun(decision.members) if decision.evidence is Evidence.OBSERVED else ()

    def _start(self, decision: Decision) -> int:
        assert self.audit is not None
        return self.audit.start(decision.members[0])


def _overwritten(decision: Decision, aliases: Aliases, leaving: Collection[str]) -> NotFoldable | None:
    """Why members cannot become identities: a write to what they take or give would be seen in the other."""
    try:
        for path in decision.leaving:
            aliases.require_apart(path, leaving.__contains__)
    except NotFoldable as no:
        return no
    return None


def _by_rule(rule: Rule, members: Sequence[Member]) -> Callable[[Modules], Rewrite]:
    def rewrite(found: Modules) -> Rewrite:
        return rule.rewrite(*(Operand(m.path, found[m.path], m.kind) for m in members))

    return rewrite


def _chosen(
    acting: Sequence[Member], allowed: frozenset[str] | None, mode: Mode
) -> tuple[Rule, Sequence[Member]]:
    """The rule for these members, and those of them that it takes."""
    kinds = tuple(member.kind for member in acting)
    rule = _rule_for(kinds, allowed, mode)
    if rule is None:
        off = _rule_for(kinds, None, mode)
        require(off is None, "rule-off", f"{off.name if off else ''} would fold it and is turned off")
        folds = mode == "folded" or _rule_for(kinds, None, "folded") is None
        classes = " -> ".join(type(member.module).__name__ for member in acting)
        require(folds, "no-training-container", f"no container trains {classes} as one")
        raise _no_rule(acting)
    for member in acting[len(rule.pattern) :]:
        require(
            member.kind not in FOLDABLE and member.kind != "batch_dependent",
            "no-rule",
            f"no rule takes {member.path} ({member.kind}) behind {rule.name}",
            remedy="list it in a group of its own, with the layer that feeds it",
        )
    return rule, acting[: len(rule.pattern)]


def _sorted(audit: Audit, group: Group) -> bool:
    starts = [audit.start(path) for path in group.modules]
    return starts == sorted(starts)


def _in_order(audit: Audit, group: Group, waves: Sequence[Wave]) -> bool:
    """Whether all are listed as they are called first in the run, or a norm behind the layers that it is
    folded into, or before them."""
    if _sorted(audit, group):
        return True
    place = {path: number for number, path in enumerate(group.modules)}
    moved = [step for wave in waves for step in wave if step.rule.equation in ("fold_output", "fold_input")]
    return all(place[step.paths[0]] < place[step.paths[1]] for step in moved)


_NOTHING_BESIDE = ("no-linear-producer", "no-linear-consumer")


@cache
def _rule_for(kinds: tuple[str, ...], allowed: frozenset[str] | None, mode: Mode) -> Rule | None:
    fitting = [rule for rule in all_rules(mode) if rule.listed and rule.matches(kinds)]
    fitting = [rule for rule in fitting if allowed is None or rule.name in allowed]
    return max(fitting, key=lambda rule: len(rule.pattern), default=None)


def _no_rule(members: Sequence[Member]) -> NotFoldable:
    for member in members:
        missing = without_statistics(member.module) if member.kind in ("batch_dependent", "norm") else None
        if missing is not None:
            return NotFoldable(*missing, remedy="leave it out of the spec: it cannot be folded")
    sequence = " -> ".join(type(member.module).__name__ for member in members)
    remedy = "'fusecli rules' lists all; extra_mappings in the spec can teach a sequence or a class"
    return NotFoldable("no-rule", f"no rule fuses {sequence}", remedy=remedy)


def _is_fused(modules: Sequence[nn.Module]) -> bool:
    """A group whose every member but the first has become an identity has nothing left to fuse."""
    return len(modules) > 1 and all(type(module) is nn.Identity for module in modules[1:])


def _wrong_order(group: Group, kinds: Sequence[str]) -> Problem | None:
    order = {"conv": 0, "conv_transpose": 0, "linear": 0, "norm": 1, "norm_with_activation": 1, "relu": 2}
    ranks = [order.get(kind, -1) for kind in kinds]
    right = [path for _, path in sorted(zip(ranks, group.modules, strict=True), key=lambda pair: pair[0])]
    by_rank = tuple(sorted(kinds, key=lambda kind: order.get(kind, -1)))
    if -1 in ranks or list(group.modules) == right or len(set(ranks)) != len(ranks):
        return None
    listed = [rule for rule in all_rules() if rule.listed and len(rule.pattern) == len(kinds)]
    if not any(rule.matches(by_rank) for rule in listed):
        return None
    return Problem(
        f"group [{', '.join(group.modules)}] is in the wrong order ({' -> '.join(kinds)})",
        group.where,
        f"did you mean [{', '.join(right)}]?",
    )
