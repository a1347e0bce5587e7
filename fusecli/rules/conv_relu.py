"""Puts a convolution and the ReLU after it into one container; no arithmetic.

What it fuses   Conv1d, Conv2d or Conv3d, then ReLU
Equation        none: the layers stay as they are
Exact when      always
Refuses when    never: nothing is computed
Before          conv (weight[, bias]) -> relu
After           ConvReLU (0.weight[, 0.bias]: the keys move below ".0") -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv", "relu", equation="none", modes=("folded", "qat"))
def conv_relu(conv: Member, relu: Member) -> Rewrite:
    return conv.contained_with(relu)
