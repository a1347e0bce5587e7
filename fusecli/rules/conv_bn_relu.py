"""Folds a norm into the convolution before it and puts the ReLU after it into one container.

What it fuses   Conv1d, Conv2d or Conv3d, then a norm as in conv_bn, then ReLU
Equation        fold_output, as in conv_bn; the ReLU is not touched
Exact when      always
Refuses when    as conv_bn
Before          conv (weight[, bias]) -> bn -> relu
After           ConvReLU (0.weight, 0.bias: the keys move below ".0") -> Identity -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv", "norm", "relu")
def conv_bn_relu(conv: Member, norm: Member, relu: Member) -> Rewrite:
    return conv.followed_by(norm, last=False) + conv.contained_with(relu)
