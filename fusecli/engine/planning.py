"""Plan: groups x rules -> decisions with reasons, without arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from torch import nn

from fusecli.engine.decisions import Decision, Group, Plan, Vocabulary, refusal
from fusecli.engine.fusers import opaque
from fusecli.engine.uses import Uses
from fusecli.errors import NotFoldable, Problem, UsageError, require
from fusecli.graph.kinds import FOLDABLE, is_norm, without_statistics
from fusecli.outcome import Refusal
from fusecli.rewrite import ModuleTree
from fusecli.rules import Rule, all_rules
from fusecli.rules._member import Member


def plan(tree: ModuleTree, groups: Iterable[Group], vocabulary: Vocabulary | None = None) -> Plan:
    """Chooses a rule for each group, without arithmetic: works on meta tensors.

    Raises UsageError where a list is in the wrong order: that is a slip in the spec, not an unsound fold.
    """
    vocabulary = vocabulary or Vocabulary()
    uses = Uses(tree)
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


def _decide(group: Group, modules: list[nn.Module], vocabulary: Vocabulary, uses: Uses) -> Decision:
    for path, module in zip(group.modules, modules, strict=True):
        if vocabulary.kind(module) in FOLDABLE:
            uses.require_single(path, module)
    if custom := vocabulary.fuser(modules):
        return Decision(group, custom.name, opaque(custom, group.modules), group.modules, custom=True)
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
