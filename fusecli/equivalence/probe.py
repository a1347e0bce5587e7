"""A float64 probe of one group: its members in a row on random input, against what the rule makes of them.

It proves a fold for classes whose forward nobody has read: subclasses that pad, norms with an activation
inside, custom fusers. It says nothing about what else reads the tensors between: that takes a run of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fusecli.graph.materialise import in_float64, probe_input
from fusecli.rewrite import ModuleTree, Rewrite, apply_rewrite, plant
from fusecli.equivalence.compare import Difference, compare

_SEED = 0x5EED


def probe(modules: Mapping[str, nn.Module], rewrite: Callable[[Mapping[str, nn.Module]], Rewrite]) -> Difference:
    """The difference between `modules` run in their order and the same after `rewrite`, both in float64.

    Raises whatever the modules' own forward raises.
    """
    original = {path: in_float64(module).eval() for path, module in modules.items()}
    fused = {path: in_float64(module).eval() for path, module in modules.items()}
    tree = ModuleTree(plant(fused))
    apply_rewrite(tree, rewrite(fused))
    x = probe_input(next(iter(original.values())), torch.Generator().manual_seed(_SEED))
    with torch.no_grad():
        return compare(chain(list(original.values()), x), chain([tree[path] for path in fused], x))


def chain(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The modules one after the other on a copy of `x`, which an in-place first module may not spoil."""
    y = x.clone()
    for module in modules:
        y = module(y)
    return y
