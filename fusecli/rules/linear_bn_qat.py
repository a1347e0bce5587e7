"""Puts a linear layer and the norm after it into one container, to be trained with simulated quantization.

What it fuses   Linear, then BatchNorm1d; with `qat: true`; a ReLU after it stays
Equation        none: the layers stay as they are, and go on learning
Exact when      always, in training as at inference
Refuses when    the norm has no gamma and beta, keeps no statistics, or is no BatchNorm
Before          linear (weight[, bias]) -> bn (weight, bias, running_mean, running_var)
After           LinearBn1d (0.weight, 1.weight, ...: the keys move below ".0" and ".1") -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("linear", "norm", equation="none", modes=("qat",))
def linear_bn_qat(linear: Member, norm: Member) -> Rewrite:
    return linear.trained_with(norm)
