"""Puts a convolution and the norm after it into one container, to be trained with simulated quantization.

What it fuses   Conv1d, Conv2d or Conv3d, then BatchNorm of the same rank; with `qat: true`
Equation        none: the layers stay as they are, and go on learning
Exact when      always, in training as at inference
Refuses when    the norm has no gamma and beta, keeps no statistics, or is no BatchNorm
Before          conv (weight[, bias]) -> bn (weight, bias, running_mean, running_var)
After           ConvBn (0.weight, 1.weight, ...: the keys move below ".0" and ".1") -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv", "norm", equation="none", modes=("qat",))
def conv_bn_qat(conv: Member, norm: Member) -> Rewrite:
    return conv.trained_with(norm)
