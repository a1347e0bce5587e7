"""Compute, then apply: nothing is applied before every rewrite is there.

Classes whose forward is not known are proven by a float64 probe first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusecli.algebra.blocks import undivided
from fusecli.engine.decisions import Decision, Modules, refusal
from fusecli.engine.promises import keeps_promise
from fusecli.errors import NotFoldable, require
from fusecli.graph.kinds import is_exact, is_norm
from fusecli.outcome import LedgerEntry, Refusal
from fusecli.proof.compare import TOLERANCE
from fusecli.proof.probe import probe
from fusecli.rewrite import ModuleTree, Rewrite, apply_rewrite


def compute(decision: Decision, modules: Modules) -> Rewrite:
    """The rewrite of one group from its modules' tensors; raises NotFoldable.

    Classes whose forward is not known are proven by a float64 probe first. What a custom fuser computes is
    its own affair until the verifier looks at it.
    """
    rewrite = decision.rewrite(modules)
    if decision.probe is not None:
        decision.probe(modules)
        return rewrite
    known = decision.custom or all(
        is_exact(modules[path]) or path in decision.shown for path in decision.members
    )
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


def replaced(rewrites: Iterable[Rewrite]) -> set[str]:
    """State-dict keys whose tensors a copy of the model need not copy: it gets new ones."""
    return {key for rewrite in rewrites for key in rewrite.tensors}


def _prove(decision: Decision, modules: Modules) -> None:
    members = {path: modules[path] for path in decision.members}
    strange = [module for module in members.values() if not is_exact(module)]
    strangers = [type(module).__name__ for module in strange]
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
    if difference.error > TOLERANCE and not layer_is_known:
        # The norm behind a layer that breaks its promise is not to be blamed for that.
        blamed = [module for module in strange if not (is_norm(module) and keeps_promise(module))]
        strangers = [type(module).__name__ for module in blamed]
    require(
        difference.error <= TOLERANCE,
        code,
        f"a float64 probe disproves the fold: {', '.join(strangers)} computes something else than its base",
        evidence=(f"relative error {difference.error:.1e} {difference.why}".strip(),),
        remedy=remedy,
    )
