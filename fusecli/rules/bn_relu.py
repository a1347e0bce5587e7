"""Puts a norm that has nothing to fold into, and the ReLU after it, into one container; no arithmetic.

What it fuses   BatchNorm1d, BatchNorm2d or BatchNorm3d, then ReLU
Equation        none: the layers stay as they are
Exact when      always
Refuses when    the norm is no BatchNorm1-3d: the field has no container for it
Before          bn (weight, bias, running_mean, running_var) -> relu
After           BNReLU (0.weight, ...: the keys move below ".0") -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("norm", "relu", equation="none", modes=("folded", "qat"))
def bn_relu(norm: Member, relu: Member) -> Rewrite:
    return norm.contained_with(relu)
