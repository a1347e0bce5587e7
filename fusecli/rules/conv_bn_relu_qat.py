"""Puts a convolution, its norm and its ReLU into one container, to be trained with simulated quantization.

What it fuses   Conv1d, Conv2d or Conv3d, then BatchNorm of the same rank, then ReLU; with `qat: true`
Equation        none: the layers stay as they are, and go on learning
Exact when      always, in training as at inference
Refuses when    the norm has no gamma and beta, keeps no statistics, or is no BatchNorm
Before          conv (weight[, bias]) -> bn (weight, bias, running_mean, running_var) -> relu
After           ConvBnReLU (0.weight, 1.weight, ...) -> Identity -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv", "norm", "relu", equation="none", modes=("qat",))
def conv_bn_relu_qat(conv: Member, norm: Member, relu: Member) -> Rewrite:
    return conv.trained_with(norm, relu)
