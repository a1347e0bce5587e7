"""Puts a linear layer and the ReLU after it into one container; no arithmetic.

What it fuses   Linear, then ReLU
Equation        none: the layers stay as they are
Exact when      always
Refuses when    never: nothing is computed
Before          linear (weight[, bias]) -> relu
After           LinearReLU (0.weight[, 0.bias]: the keys move below ".0") -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("linear", "relu", equation="none", modes=("folded", "qat"))
def linear_relu(linear: Member, relu: Member) -> Rewrite:
    return linear.contained_with(relu)
