"""One group judged by itself: its members in a row on random input, where nobody can run the whole model.

This proves the arithmetic of the fold and the stored tensors. That the members follow each other in the
model is what the list claims, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fusecli.equivalence.groups import GroupCheck
from fusecli.equivalence.probe import chain
from fusecli.equivalence.stored import holds_fold
from fusecli.graph.materialise import in_float64, probe_input, with_tensors
from fusecli.rewrite import ModuleTree, Rewrite, apply_rewrite, plant
from fusecli.sample import Sample

Modules = Mapping[str, nn.Module]


def judge_alone(
    original: Modules, rewrite: Callable[[Modules], Rewrite], stored: Mapping[str, Tensor], seed: int
) -> tuple[GroupCheck, list[str]]:
    """What was seen of the group, and the keys whose stored tensors do not hold the fold.

    original  the members by path, in their order, in the stored dtype
    stored    the artifact's tensors by the key that they have before the edits
    """
    exact = _twin(original)
    exact_rewrite = rewrite(exact)
    wrong = [
        key
        for key, value in exact_rewrite.tensors.items()
        if key not in stored or not holds_fold(value, stored[key], folded=True)
    ]
    after = _applied(exact, exact_rewrite)
    if wrong:
        return GroupCheck(
            tuple(original), after, after, trouble="its stored tensors do not hold the fold"
        ), wrong
    plain = {path: with_tensors(module, lambda _, old: old) for path, module in original.items()}
    fused = _applied(plain, Rewrite(stored, exact_rewrite.edits))
    before = list(_twin(original).values()), list(original.values())
    check = GroupCheck(tuple(original), after, fused, before=before)
    generator = torch.Generator().manual_seed(seed)
    x = probe_input(next(iter(original.values())), generator)
    with torch.no_grad():
        check.semantic(0, Sample((x,)), chain(before[0], x))
        narrow = x.to(next(p.dtype for module in original.values() for p in module.parameters()))
        check.stored(0, Sample((narrow,)), chain(before[1], narrow))
    return check, []


def _twin(modules: Modules) -> dict[str, nn.Module]:
    return {path: in_float64(module).eval() for path, module in modules.items()}


def _applied(modules: Modules, rewrite: Rewrite) -> list[nn.Module]:
    tree = ModuleTree(plant(modules))
    apply_rewrite(tree, rewrite)
    return [tree[path] for path in modules]
