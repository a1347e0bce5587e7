"""A float64 probe of one group: its members in a row on random input, against what the rule makes of them.

It proves a fold for classes whose forward nobody has read: subclasses that pad, norms with an activation
inside. It says nothing about what else reads the tensors between: that takes a run of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fusecli.graph.materialise import in_float64, probe_inputs
from fusecli.proof.compare import Difference, compare
from fusecli.proof.run import float64_arithmetic
from fusecli.rewrite import ModuleTree, Rewrite, apply_rewrite, stand_in_model

_SEED = 0x5EED


def probe(
    modules: Mapping[str, nn.Module], rewrite: Callable[[Mapping[str, nn.Module]], Rewrite]
) -> Difference:
    """The difference between `modules` run in their order and the same after `rewrite`, both in float64.

    Raises whatever the modules' own forward raises.
    """
    original = {path: in_float64(module).eval() for path, module in modules.items()}
    fused = {path: in_float64(module).eval() for path, module in modules.items()}
    tree = ModuleTree(stand_in_model(fused))
    with float64_arithmetic():  # what computes a weight is run here too
        apply_rewrite(tree, rewrite(fused))
    found = []
    for x in probe_inputs(next(iter(original.values())), _SEED):
        with torch.no_grad(), float64_arithmetic():
            expected, given = chain(list(original.values()), x), chain([tree[path] for path in fused], x)
            found.append(compare(expected, given))
    return worst_of(found)


def worst_of(differences: Sequence[Difference]) -> Difference:
    """The largest of them; where the original itself gives NaN it counts only if it does so everywhere."""
    defined = [difference for difference in differences if not difference.undefined]
    return max(defined or differences, key=lambda difference: difference.error)


def changed_shape(modules: Sequence[nn.Module], result: nn.Module) -> str:
    """How the output of `result` differs in shape from that of `modules` in a row; "" where it does not.

    Also "" where nobody can tell, because the modules do not run in a row on random input.
    """
    try:
        inputs = list(probe_inputs(modules[0], _SEED))
    except Exception:  # of a class that nobody knows an input for
        return ""
    return next(filter(None, (_changed_shape(modules, result, x) for x in inputs)), "")


def _changed_shape(modules: Sequence[nn.Module], result: nn.Module, x: Tensor) -> str:
    try:
        expected = _run([in_float64(module).eval() for module in modules], x)
    except Exception:  # whatever somebody's forward may raise
        return ""
    try:
        output = _run([in_float64(result).eval()], x)
    except Exception as error:
        return f"raises {type(error).__name__}: {error}"
    if not isinstance(output, Tensor):
        return f"answers with a {type(output).__name__}, not a tensor"
    if output.shape == expected.shape:
        return ""
    return f"changes the shape of the output from {list(expected.shape)} to {list(output.shape)}"


def _run(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    with torch.no_grad(), float64_arithmetic():
        return chain(modules, x)


def chain(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The modules one after the other on a copy of `x`, which an in-place first module may not spoil."""
    y = x.clone()
    for module in modules:
        y = module(y)
    return y
