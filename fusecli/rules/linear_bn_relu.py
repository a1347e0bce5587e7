"""Folds a norm into the linear layer before it and puts the ReLU after it into one container.

What it fuses   Linear, then BatchNorm1d, then ReLU
Equation        fold_output, as in linear_bn; the ReLU is not touched
Exact when      as linear_bn
Refuses when    as linear_bn
Before          linear (weight[, bias]) -> bn -> relu
After           LinearReLU (0.weight, 0.bias: the keys move below ".0") -> Identity -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("linear", "norm", "relu")
def linear_bn_relu(linear: Member, norm: Member, relu: Member) -> Rewrite:
    return linear.followed_by(norm, last=False) + linear.contained_with(relu)
