"""`shared: clone`: which modules are given a copy of their own, so that they can be folded at one name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fusecli.engine.decisions import Decision, Modules, Vocabulary
from fusecli.graph.kinds import FOLDABLE
from fusecli.graph.memory import same_memory
from fusecli.rewrite import ModuleTree, Own, Rewrite


def shared_roots(tree: ModuleTree, vocabulary: Vocabulary) -> list[str]:
    """Every name of a foldable module that is known under several, or whose tensors are another's too.

    Where a whole block has several names, it is the block: its children cannot be replaced at one of them.
    """
    names: dict[int, int] = {}
    for module in tree.modules.values():
        names[id(module)] = names.get(id(module), 0) + 1
    tied = {name.rpartition(".")[0] for group in same_memory(tree.model) for name in group}
    roots: dict[str, None] = {}
    for path, module in tree.modules.items():
        if vocabulary.kind(module) in FOLDABLE:
            above = (path[:end] for end in _ends(path) if names[id(tree[path[:end]])] > 1)
            root = next(above, path if path in tied else None)
            if root is not None:
                roots[root] = None
    return list(roots)


def _ends(path: str) -> Iterable[int]:
    """Where the names of the modules around `path` end, the outermost first, and its own."""
    return (*(i for i, letter in enumerate(path) if letter == "."), len(path))


def separate(tree: ModuleTree, roots: Iterable[str]) -> None:
    """Gives each of these modules a copy of its own."""
    for root in roots:
        tree.own(root)


def needed(roots: Sequence[str], decisions: Iterable[Decision], alone: Iterable[str] = ()) -> list[str]:
    """Those that a group or a layer `alone` is in: no other tie is broken."""
    members = [*alone, *(path for decision in decisions for path in decision.members)]
    return [root for root in roots if any(f"{path}.".startswith(f"{root}.") for path in members)]


def owning(decision: Decision, roots: Sequence[str]) -> Decision:
    """The decision whose rewrite breaks the ties that stand in its way first."""
    own = tuple(Own(root) for root in needed(roots, [decision]))
    if not own:
        return decision

    def rewrite(modules: Modules) -> Rewrite:
        return Rewrite(edits=own) + decision.rewrite(modules)

    return replace(decision, rewrite=rewrite)
