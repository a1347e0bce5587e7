"""`bake: true` and adapters: layers whose weight is computed become plain before anything is planned.

What is planned, recorded and audited is the model with plain layers; what is computed starts from the tensors
that are stored, in float64, and is rounded once at the very end.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fusecli.algebra import round_once
from fusecli.engine.decisions import Decision, Group, Modules, Vocabulary
from fusecli.engine.inside import untouched
from fusecli.engine.uses import Uses
from fusecli.errors import NotFoldable, Problem, RefusedError, require
from fusecli.graph.kinds import FOLDABLE, LAYER_KINDS
from fusecli.graph.materialise import in_float64, with_tensors
from fusecli.graph.record import Run
from fusecli.nn import Adapted, computed_tensor, make_plain
from fusecli.outcome import Evidence
from fusecli.proof.region import Region
from fusecli.proof.run import float64_arithmetic
from fusecli.rewrite import KeyMap, ModuleTree, Plain, Rewrite, apply_rewrite, stand_in_model
from fusecli.rules import all_rules
from fusecli.rules._member import Member

_KINDS = {"bake": "computed", "lora": "adapted"}
Bakes = Mapping[str, str]  # the paths of layers that become plain, and the rule that does it


def computed_layers(
    tree: ModuleTree, vocabulary: Vocabulary, among: Collection[str] | None = None
) -> dict[str, str]:
    """Each layer and norm (`among` these) with a computed weight or bias, and the rule to make it plain."""
    return {
        path: "lora" if isinstance(module, Adapted) else "bake"
        for path, module in tree.modules.items()
        if vocabulary.kind(module) in FOLDABLE
        and computed_tensor(module)[0]
        and (among is None or path in among)
    }


def bake_tree(tree: ModuleTree, bakes: Bakes) -> None:
    """Makes these layers plain, each number in the dtype it has: enough to plan on and to record.

    Raises RefusedError where somebody's parametrization computes nothing, here or without numbers.
    """
    for path in bakes:
        try:
            apply_rewrite(tree, Rewrite(edits=(Plain(path),)))
        except Exception as error:  # whatever somebody's parametrization may raise
            what = f"its weight cannot be computed: {type(error).__name__}: {error}"
            raise RefusedError(Problem(what, path, "exclude it, or make it plain first")) from error


def alone(tree: ModuleTree, group: Group, bakes: Bakes, vocabulary: Vocabulary, run: Run | None) -> Decision:
    """The decision for a layer that is made plain and not folded; raises NotFoldable."""
    (path,) = group.modules
    require(
        vocabulary.kind(tree[path]) in LAYER_KINDS,
        "no-rule",
        f"{path} is no layer, and only layers are baked alone",
        remedy="list it with the layer that it is folded into, or leave it out",
    )
    Uses(tree).require_single(path, tree[path])
    visits = run.recording.visits_of(path) if run is not None else []
    if run is not None and visits:
        untouched(run.recording, path)
    return Decision(
        group,
        "",
        lambda _: Rewrite(),
        (path,),
        evidence=Evidence.OBSERVED if visits else Evidence.CLAIMED,
        region=Region(run.recording, (path,), chain=True) if run is not None and visits else None,
    )


def baking(decision: Decision, bakes: Bakes) -> Decision:
    """The decision whose rewrite makes its computed layers plain first."""
    rules = {path: bakes[path] for path in decision.members if path in bakes}
    if not rules:
        return decision

    def plain(modules: Modules) -> tuple[Modules, Rewrite]:
        found = {path: _plain(path, rule, modules[path]) for path, rule in rules.items()}
        made = Rewrite()
        for _, rewrite in found.values():
            made = made + rewrite
        return {**modules, **{path: module for path, (module, _) in found.items()}}, made

    def rewrite(modules: Modules) -> Rewrite:
        if decision.custom:
            raise _opaque(decision, next(iter(rules)))
        wide, made = plain(modules)
        made = made + decision.rewrite(wide)
        gone = KeyMap(made.edits)
        kept = {key: tensor for key, tensor in made.tensors.items() if gone(key) is not None}
        return Rewrite(
            {key: _rounded(key, tensor, modules, rules) for key, tensor in kept.items()}, made.edits
        )

    names = dict.fromkeys((*rules.values(), *filter(None, [decision.rule])))
    prove = decision.probe
    probe = None if prove is None else (lambda modules: prove(plain(modules)[0]))
    return replace(decision, rule="+".join(names), rewrite=rewrite, probe=probe)


def _plain(path: str, rule: str, module: nn.Module) -> tuple[nn.Module, Rewrite]:
    """A plain float64 copy of the layer, and the rewrite that makes it so."""
    wide = in_float64(module).eval()
    if not computed_tensor(module)[0]:
        # The model that is planned on: its layers are plain already, and have no numbers.
        return wide, Rewrite(_parameters(path, wide), (Plain(path),))
    operand = Member(path, wide, _KINDS[rule])
    try:
        with float64_arithmetic():
            rewrite = next(each for each in all_rules() if each.name == rule).rewrite(operand)
            tree = ModuleTree(stand_in_model({path: wide}))
            apply_rewrite(tree, rewrite)
            wide = tree[path]
    except NotFoldable:
        raise
    except Exception as error:  # whatever somebody's parametrization may raise
        reason = f"the weight of {path} cannot be computed in float64: {type(error).__name__}: {error}"
        raise NotFoldable("parametrized", reason, remedy="leave the layer out") from error
    return wide, Rewrite(_parameters(path, wide), rewrite.edits)


def _parameters(path: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{path}.{name}": p.detach() for name, p in module._parameters.items() if p is not None}


def _rounded(key: str, tensor: Tensor, modules: Modules, rules: Bakes) -> Tensor:
    """In the dtype that the layer itself would compute it in, or for a new bias that of its weight."""
    path, _, name = key.rpartition(".")
    if path not in rules or tensor.dtype is not torch.float64:
        return tensor
    own = with_tensors(modules[path], lambda _, old: old.to("meta")).eval()
    make_plain(own)
    like = own._parameters.get(name)
    like = own._parameters["weight"] if like is None else like
    assert like is not None
    return round_once(tensor, like.dtype)


def _opaque(decision: Decision, path: str) -> NotFoldable:
    reason = f"the custom fuser {decision.rule} takes {path}, and makes of its computed weight what it likes"
    return NotFoldable("parametrized", reason, remedy="leave the group out, or exclude it from `bake`")
