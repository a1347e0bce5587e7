"""Models in memory: seen as a checkpoint, copied, taken apart, edited; and what that changes besides."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn
from torch.nn.parameter import is_lazy

from fusecli.checkpoint import Checkpoint, StoredTensor
from fusecli.engine import Decision, bake_tree, compute_all, replaced, separate
from fusecli.engine.baking import Bakes
from fusecli.errors import Problem, UsageError
from fusecli.graph.held import holds
from fusecli.graph.materialise import duplicate
from fusecli.graph.memory import same_memory
from fusecli.jobs.adapter import Adapter, dress
from fusecli.jobs.fold import Fold, Refused
from fusecli.outcome import LedgerEntry, Mode, Refusal
from fusecli.plain import some
from fusecli.rewrite import Bias, Identity, ModuleTree, Rewrite, Zero, apply_rewrite


def applied(
    model: nn.Module,
    decisions: Sequence[Decision],
    rewrites: Sequence[Rewrite],
    *,
    inplace: bool,
    mode: Mode = "folded",
) -> tuple[nn.Module, list[LedgerEntry]]:
    """`model`, or a copy of it, with the rewrites done, and what was lost; in eval mode, unless it is to be
    trained."""
    if not inplace:
        # Weights that get a new value need no copy: until then the copy holds the original's own. A module
        # that is held a second time keeps its weights there.
        new, held = replaced(rewrites), {hold.path for hold in holds(model)}
        shared = {
            id(p): p
            for name, p in model.named_parameters()
            if name in new and name.rpartition(".")[0] not in held
        }
        model = duplicate(model, shared)
    if mode == "folded":
        model.eval()
    tree = ModuleTree(model)
    lost = [entry for rewrite in rewrites for entry in apply_rewrite(tree, rewrite)]
    if decisions:
        custom = any(decision.custom for decision in decisions)
        tree.note_groups({decision.group.modules: decision.rule for decision in decisions}, custom=custom)
    return model, lost


def apart(model: nn.Module, roots: Sequence[str], bakes: Bakes | None = None) -> nn.Module:
    """The model itself, or a copy in which these modules share nothing with other names, and these layers are
    plain, their weights rounded: enough to plan on and to record."""
    if not roots and not bakes:
        return model
    twin = duplicate(model)
    separate(ModuleTree(twin), roots)
    if bakes:
        twin.eval()  # by itself: a class may have a train() that returns nothing
        bake_tree(ModuleTree(twin), bakes)
    return twin


def adapted(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy that computes what the model does with the adapter beside its layers; raises as `dress` does."""
    twin = duplicate(model)
    dress(twin, adapter, tied={name for names in same_memory(twin) for name in names})
    for name, stored in adapter.tensors.items():
        path, _, local = name.rpartition(".")
        layer = twin.get_submodule(path)
        place = layer.get_parameter("weight").device
        layer._parameters[local] = nn.Parameter(stored.load().clone().to(place), requires_grad=False)
    return twin


def require_folds(tree: ModuleTree, fold: Fold) -> list[Rewrite]:
    """The rewrites of all groups; raises Refused with those whose numbers forbid the fold."""
    rewrites, refused = compute_all(tree, fold.decisions)
    if refused:
        raise Refused(refused)
    return rewrites


def as_checkpoint(model: nn.Module) -> Checkpoint:
    """The model's state dict as the checkpoint that it would be, without a file."""
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        what = f"{', '.join(lazy[:3])} has no shape yet"
        raise UsageError(Problem(what, "model", "run the model once before it is fused"))
    try:
        state = model.state_dict()
    except Exception as error:  # whatever somebody's class or hook may raise
        what = f"it gives no state dict: {type(error).__name__}: {error}"
        raise UsageError(Problem(what, "model", "make model.state_dict() work first")) from error
    tensors = {
        name: StoredTensor(name, tensor.dtype, tuple(tensor.shape), tensor.detach)
        for name, tensor in state.items()
        if hasattr(tensor, "dtype")
    }
    return Checkpoint(Path("(in memory)"), "in memory", tensors, ())


def resting(tree: ModuleTree, decisions: Iterable[Decision]) -> list[Refusal]:
    """The groups that are to be trained and have members in eval mode."""
    found = []
    for decision in decisions:
        names = [path for path in decision.members if not tree[path].training]
        if names:
            what = f"it is to be trained, and in eval mode: {', '.join(names)}"
            remedy = "call model.train() first; without qat the norms are folded"
            found.append(Refusal(decision.group.modules, "eval-mode", what, decision.rule, (), remedy))
    return found


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares nothing with `model`."""
    twin = duplicate(model)
    twin.eval()  # by itself: a class may have a train() that returns nothing
    return twin


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


def names_of(tree: ModuleTree) -> list[str]:
    """Every name of every module but the model itself."""
    return [path for path in tree.modules if path]


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
