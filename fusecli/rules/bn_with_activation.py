"""Folds the affine part of a norm class that has an activation or a drop inside, and keeps the rest of it.

What it fuses   a convolution, transposed convolution or linear layer, then a norm class with submodules
                (BatchNormAct2d and the like)
Equation        fold_output:  act(s (W x + b) + t) = act((s W) x + (s b + t))
Exact when      the class normalises first and then calls its submodules once each, in their order; a float64
                probe of the group has to prove it
Refuses when    the probe fails; else as conv_bn
Before          conv (weight[, bias]) -> norm (weight, bias, statistics, act)
After           conv (weight, bias) -> Sequential (act), at the norm's place and under the norm's key names
"""

from __future__ import annotations

from fusecli.algebra import fold_output
from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv|conv_transpose|linear", "norm_with_activation")
def bn_with_activation(layer: Member, norm: Member) -> Rewrite:
    return layer.becomes(fold_output(layer.op, norm.affine, layer.dtype)) + norm.leaves_children(layer)
