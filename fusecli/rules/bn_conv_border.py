"""Folds a norm into the zero-padded convolution after it, which then pads with a value for each channel.

What it fuses   BatchNorm (or another norm with running statistics), a scale or a gain, then Conv1d-3d that
                pads zeros; only with --allow-restructure, because the layer becomes one of another class
Equation        fold_input:  W (s x + t) + b = (W s) x + (W t + b), and s p + t = 0 for p = -t / s at the
                border
Exact when      no scale is 0 (where one is 0, so has to be its shift)
Refuses when    a scale is 0 and its shift is not (padding-border), the class of the convolution is not known
Before          bn (weight, bias, running_mean, running_var) -> conv (weight[, bias])
After           Identity -> BorderedConv (weight, bias, border)
"""

from __future__ import annotations

from fusecli.algebra import fold_input
from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("norm|scale|gain", "conv", equation="fold_input", restructures=True)
def bn_conv_border(norm: Member, conv: Member) -> Rewrite:
    inside = fold_input(conv.op.unpadded, norm.affine, conv.dtype)
    return conv.bordered_with(norm.affine) + conv.computes(inside) + norm.passed_to(conv)
