"""Plan (groups x rules -> decisions with reasons), then compute, then apply.

All groups are checked before the first is applied; if one fails, nothing has changed. What all rules share
(members used under one name, weights not tied, unknown classes proven by a probe) lives here, once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn

from fusecli.algebra.blocks import undivided
from fusecli.equivalence.compare import TOLERANCE
from fusecli.equivalence.probe import changed_shape, probe
from fusecli.errors import NotFoldable, Problem, UsageError, require
from fusecli.graph.kinds import FOLDABLE, is_exact, is_norm, kind_of, without_statistics
from fusecli.graph.materialise import with_tensors
from fusecli.outcome import LedgerEntry, Refusal
from fusecli.rewrite import ModuleTree, Opaque, Rewrite, apply_rewrite
from fusecli.rules import Rule, all_rules
from fusecli.rules._member import Member

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Group:
    """Names to fuse, where they were written, and what the spec says that no module or tensor can."""

    modules: tuple[str, ...]
    where: str = ""
    hints: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CustomFuser:
    """A user's function for one exact sequence of classes, called as (is_qat, *modules), as by torch.ao."""

    sequence: tuple[type, ...]
    name: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Vocabulary:
    """What the user taught the tool: custom fusers, and classes to be treated as another one."""

    fusers: tuple[CustomFuser, ...] = ()
    treat: Mapping[type, type] = field(default_factory=dict)

    def kind(self, module: nn.Module) -> str:
        return kind_of(module, self.treat.get(type(module)))

    def fuser(self, modules: Sequence[nn.Module]) -> CustomFuser | None:
        """The user's fuser for exactly these classes; it goes before any rule."""
        types = tuple(type(module) for module in modules)
        return next((custom for custom in self.fusers if custom.sequence == types), None)


@dataclass(frozen=True)
class Decision:
    """How one group is fused: `members` take part in the rule, `kept` stay where they are.

    `custom`: a user's fuser does it, and has to be given real tensors.
    """

    group: Group
    rule: str
    rewrite: Callable[[Modules], Rewrite] = field(compare=False, repr=False)
    members: tuple[str, ...]
    kept: tuple[str, ...] = ()
    custom: bool = False


@dataclass(frozen=True)
class Plan:
    """Decisions in the order of the groups; `done` are the groups that are fused already."""

    decisions: tuple[Decision, ...] = ()
    refused: tuple[Refusal, ...] = ()
    done: tuple[Group, ...] = ()


def plan(tree: ModuleTree, groups: Iterable[Group], vocabulary: Vocabulary | None = None) -> Plan:
    """Chooses a rule for each group, without arithmetic: works on meta tensors.

    Raises UsageError where a list is in the wrong order: that is a slip in the spec, not an unsound fold.
    """
    vocabulary = vocabulary or Vocabulary()
    uses = _Uses(tree)
    earlier = set(tree.fused_groups)
    decisions: list[Decision] = []
    refused: list[Refusal] = []
    done: list[Group] = []
    slips: list[Problem] = []
    for group in groups:
        modules = [tree[path] for path in group.modules]
        kinds = [vocabulary.kind(module) for module in modules]
        if _is_fused(modules) or (group.modules in earlier and not any(map(is_norm, modules))):
            done.append(group)
        elif not vocabulary.fuser(modules) and (slip := _wrong_order(group, kinds)):
            slips.append(slip)
        else:
            try:
                decisions.append(_decide(group, modules, vocabulary, uses))
            except NotFoldable as no:
                refused.append(refusal(group, no))
    if slips:
        raise UsageError(*slips)
    return Plan(tuple(decisions), tuple(refused), tuple(done))


def compute(decision: Decision, modules: Modules) -> Rewrite:
    """The rewrite of one group from its modules' tensors; raises NotFoldable.

    Classes whose forward is not known are proven by a float64 probe first. What a custom fuser computes is
    its own affair until the verifier looks at it.
    """
    rewrite = decision.rewrite(modules)
    known = decision.custom or all(is_exact(modules[path]) for path in decision.members)
    if rewrite.tensors and not known:
        _prove(decision, modules)
    return rewrite


def fuse_tree(tree: ModuleTree, decisions: Sequence[Decision]) -> tuple[list[LedgerEntry], list[Refusal]]:
    """Computes every decision and, only if none is refused, applies them all; returns ledger and refusals."""
    rewrites, refused = compute_all(tree, decisions)
    if refused:
        return [], refused
    return [entry for rewrite in rewrites for entry in apply_rewrite(tree, rewrite)], []


def compute_all(tree: ModuleTree, decisions: Sequence[Decision]) -> tuple[list[Rewrite], list[Refusal]]:
    """The rewrites of all decisions; nothing is applied."""

    def attempt(decision: Decision) -> Rewrite | Refusal:
        try:
            return compute(decision, {path: tree[path] for path in decision.members})
        except NotFoldable as no:
            return refusal(decision.group, no, decision.rule)

    with undivided():
        found = [attempt(decision) for decision in decisions]
    refused = [result for result in found if isinstance(result, Refusal)]
    return [result for result in found if isinstance(result, Rewrite)], refused


def refusal(group: Group, no: NotFoldable, rule: str | None = None) -> Refusal:
    evidence = (*no.evidence, group.where) if group.where else no.evidence
    return Refusal(group.modules, no.code, no.reason, rule, evidence, no.remedy)


class _Uses:
    """Under how many names each module and each parameter of a model is known."""

    def __init__(self, tree: ModuleTree) -> None:
        self._modules = Counter(id(module) for module in tree.modules.values())
        owners = {id(module): module for module in tree.modules.values()}
        self._parameters = Counter(
            id(parameter)
            for module in owners.values()
            for parameter in module._parameters.values()
            if parameter is not None
        )

    def require_single(self, path: str, module: nn.Module) -> None:
        require(
            self._modules[id(module)] == 1,
            "shared-module",
            f"{path} is the same module as another name of the model",
            remedy="give each place its own module",
        )
        tied = [n for n, p in module.named_parameters() if self._parameters[id(p)] > 1]
        names = ", ".join(f"{path}.{name}" for name in tied)
        require(
            not tied,
            "tied-weights",
            f"{names} is tied to a parameter of another module, which the fold would change too",
            remedy="untie it (clone the parameter) before fusing",
        )


def _decide(group: Group, modules: list[nn.Module], vocabulary: Vocabulary, uses: _Uses) -> Decision:
    for path, module in zip(group.modules, modules, strict=True):
        if vocabulary.kind(module) in FOLDABLE:
            uses.require_single(path, module)
    if custom := vocabulary.fuser(modules):
        return Decision(group, custom.name, _opaque(custom, group.modules), group.modules, custom=True)
    members = [
        (path, module, vocabulary.kind(module)) for path, module in zip(group.modules, modules, strict=True)
    ]
    # An identity or a dropout between two members does nothing at inference; it stays where it is.
    acting = [member for member in members if member[2] != "nothing"]
    kinds = tuple(kind for _, _, kind in acting)
    rule = _rule_for(kinds)
    if rule is None:
        _refuse_sequence(members)
    assert rule is not None
    taken, rest = acting[: len(rule.pattern)], acting[len(rule.pattern) :]
    for path, _, kind in rest:
        require(
            kind not in FOLDABLE and kind != "batch_dependent",
            "no-rule",
            f"no rule takes {path} ({kind}) behind {rule.name}",
            remedy="list it in a group of its own, with the layer that feeds it",
        )
    names = tuple(path for path, _, _ in taken)
    return Decision(
        group,
        rule.name,
        lambda found: rule.rewrite(*(Member(path, found[path], kind) for path, _, kind in taken)),
        names,
        tuple(path for path in group.modules if path not in names),
    )


@cache
def _rule_for(kinds: tuple[str, ...]) -> Rule | None:
    return next((rule for rule in all_rules() if rule.matches(kinds)), None)


def _refuse_sequence(members: list[tuple[str, nn.Module, str]]) -> None:
    for _, module, kind in members:
        missing = without_statistics(module) if kind in ("batch_dependent", "norm") else None
        require(
            missing is None, *(missing or ("", "")), remedy="leave it out of the spec: it cannot be folded"
        )
    sequence = " -> ".join(type(module).__name__ for _, module, _ in members)
    require(
        False,
        "no-rule",
        f"no rule fuses {sequence}",
        remedy="'fusecli rules' lists all; extra_mappings in the spec can teach a sequence or a class",
    )


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
    if not any(rule.matches(by_rank) and len(rule.pattern) == len(kinds) for rule in all_rules()):
        return None
    return Problem(
        f"group [{', '.join(group.modules)}] is in the wrong order ({' -> '.join(kinds)})",
        group.where,
        f"did you mean [{', '.join(right)}]?",
    )


def _prove(decision: Decision, modules: Modules) -> None:
    members = {path: modules[path] for path in decision.members}
    strangers = [type(module).__name__ for module in members.values() if not is_exact(module)]
    layer_is_known = is_exact(next(iter(members.values())))
    code = "not-affine" if layer_is_known else "not-linear-in-weight"
    remedy = "teach it with extra_mappings (sequence and fuser) or leave it out"
    try:
        difference = probe(members, decision.rewrite)
    except NotFoldable:
        raise
    except Exception as error:  # whatever somebody's forward may raise
        message = f"{', '.join(strangers)} could not be probed: {type(error).__name__}: {error}"
        raise NotFoldable(code, message, remedy=remedy) from error
    require(
        difference.error <= TOLERANCE,
        code,
        f"a float64 probe disproves the fold: {', '.join(strangers)} computes something else than its base",
        evidence=(f"relative error {difference.error:.1e} {difference.why}".strip(),),
        remedy=remedy,
    )


def _opaque(custom: CustomFuser, members: tuple[str, ...]) -> Callable[[Modules], Rewrite]:
    def rewrite(modules: Modules) -> Rewrite:
        # The fuser works on copies: it may change its arguments, and another group may still be refused.
        copies = [with_tensors(modules[path], lambda _, old: old.clone()) for path in members]
        result = call_fuser(custom, copies)
        wrong = changed_shape([modules[path] for path in members], result)
        require(not wrong, "fuser-error", f"what fuser {custom.name} returned {wrong}")
        tensors = {f"{members[0]}.{name}": tensor for name, tensor in result.state_dict().items()}
        return Rewrite(tensors, (Opaque(members[0], members, custom.name, result),))

    return rewrite


def call_fuser(custom: CustomFuser, modules: Sequence[nn.Module]) -> nn.Module:
    """What a custom fuser returns; its mistakes are refusals that carry its name."""
    try:
        result = custom.function(False, *modules)
    except Exception as error:  # whatever somebody's code may raise
        message = f"fuser {custom.name} raised {type(error).__name__}: {error}"
        raise NotFoldable("fuser-error", message) from error
    require(
        isinstance(result, nn.Module),
        "fuser-error",
        f"fuser {custom.name} returned a {type(result).__name__}, not an nn.Module",
    )
    module: nn.Module = result
    return module


def replaced(rewrites: Iterable[Rewrite]) -> set[str]:
    """State-dict keys whose tensors a copy of the model need not copy: it gets new ones."""
    return {key for rewrite in rewrites for key in rewrite.tensors}
