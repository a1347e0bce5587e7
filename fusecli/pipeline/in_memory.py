"""What a fold of a model in memory changes besides, and what stands against it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from fusecli.engine import Decision
from fusecli.graph.held import holds
from fusecli.outcome import LedgerEntry, Refusal
from fusecli.plain import some
from fusecli.rewrite import Bias, Identity, ModuleTree, Rewrite, Zero


def members_in_eval_mode(tree: ModuleTree, decisions: Iterable[Decision]) -> list[Refusal]:
    """The groups that are to be trained and have members in eval mode."""
    found = []
    for decision in decisions:
        names = [path for path in decision.members if not tree[path].training]
        if names:
            what = f"it is to be trained, and in eval mode: {', '.join(names)}"
            remedy = "call model.train() first; without qat the norms are folded"
            found.append(Refusal(decision.group.modules, "eval-mode", what, decision.rule, (), remedy))
    return found


def held_warnings(model: nn.Module, decisions: Iterable[Decision], *, inplace: bool) -> list[str]:
    """What the model holds of the groups outside of its module tree, where the fold does not reach."""
    group_of = {path: decision.group.modules for decision in decisions for path in decision.group.modules}
    modules: dict[str, dict[str, None]] = {}
    tensors: dict[str, dict[str, None]] = {}
    functions: dict[str, None] = {}
    for hold in holds(model):
        if hold.path in group_of:
            found, name = (tensors, f"{hold.path}.{hold.tensor}") if hold.tensor else (modules, hold.path)
            found.setdefault(hold.name, {})[name] = None
        elif hold.function and not inplace and any(_around(hold.path, path) for path in group_of):
            functions[hold.name] = None
    return [
        *(_held_modules(name, paths, group_of) for name, paths in modules.items()),
        *(
            f"`{name}` holds {some([*names])} too: what is read through it has the values before the fold"
            for name, names in tensors.items()
        ),
        *(
            f"`{name}` is a function that holds a module of the original, and no copy of it: what forward "
            "runs through it is not fused; pass inplace=True"
            for name in functions
        ),
    ]


def _held_modules(name: str, paths: Collection[str], group_of: Mapping[str, tuple[str, ...]]) -> str:
    groups = dict.fromkeys(group_of[path] for path in paths)
    missing = [path for group in groups for path in group if path not in paths]
    if missing:
        return (
            f"`{name}` holds {some([*paths])} too, and not {some(missing)}: where forward runs them there, "
            "the model computes something else now; fusecli.fuse finds out"
        )
    return f"`{name}` holds {some([*paths])} too: what forward runs through it stays unfused"


def _around(path: str, member: str) -> bool:
    return not path or member.startswith(f"{path}.")


def new_biases(tree: ModuleTree, rewrites: Iterable[Rewrite]) -> list[LedgerEntry]:
    """Parameters that an optimizer or a freezing loop has not seen before."""
    edits = [edit for rewrite in rewrites for edit in rewrite.edits]
    gone = {edit.path for edit in edits if isinstance(edit, Identity | Zero)}
    given = dict.fromkeys(edit.path for edit in edits if isinstance(edit, Bias) and edit.path not in gone)
    layers = [(path, tree[path]) for path in given]
    new = [(path, layer) for path, layer in layers if layer._parameters.get("bias") is None]
    return [
        LedgerEntry(
            "requires-grad",
            f"{path}.bias",
            f"a new parameter, requires_grad={weight.requires_grad} as its weight",
        )
        for path, layer in new
        if (weight := layer._parameters.get("weight")) is not None
    ]


def in_train_mode(model: nn.Module) -> list[LedgerEntry]:
    """The modules without submodules that have to be set to eval."""
    return [
        LedgerEntry("train-mode", path or "(the model)", "was in train mode; set to eval")
        for path, module in model.named_modules()
        if module.training and not any(True for _ in module.children())
    ]
