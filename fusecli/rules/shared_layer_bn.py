"""Folds the norms behind the calls of one layer into copies of that layer, one for each norm.

What it fuses   a layer that is called several times, each time with a norm of its own behind it (PolyNet);
                only with `shared: clone`, because the layer's weight is stored once for each norm then
Equation        fold_output:  s_i (W x + b) + t_i = (s_i W) x + (s_i b + t_i) for the i-th norm
Exact when      always
Refuses when    a call has no norm behind it, something else reads what the layer gives
Before          layer (weight[, bias]) -> bn_0, bn_1, ... (weight, bias, running_mean, running_var)
After           Identity -> bn_0, bn_1, ...: layers (weight, bias) in the places of the norms
"""

from __future__ import annotations

from fusecli.algebra import fold_output
from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv|conv_transpose|linear", "norm", clones=True)
def shared_layer_bn(layer: Member, norm: Member) -> Rewrite:
    return norm.becomes_copy(layer, fold_output(layer.op, norm.affine, layer.dtype)) + layer.passed_to(norm)
