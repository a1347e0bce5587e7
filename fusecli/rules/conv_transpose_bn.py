"""Folds a norm with running statistics into the transposed convolution before it, at any number of groups.

What it fuses   ConvTranspose1d, ConvTranspose2d or ConvTranspose3d, then a norm as in conv_bn. A ReLU listed
                after it stays where it is: no container of the field takes a transposed convolution
Equation        fold_output on the weight as [g, o, i, *k]; it is stored as [g i, o, *k], so the scale goes to
                axes (0, 1) of the value and never to axis 0 of the storage
Exact when      always: any stride, padding, output_padding, dilation and groups
Refuses when    as conv_bn
Before          conv (weight[, bias]) -> bn
After           conv (weight of the same shape, bias) -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv_transpose", "norm")
def conv_transpose_bn(conv: Member, norm: Member) -> Rewrite:
    return conv.followed_by(norm)
