"""Folds a norm with running statistics into the convolution before it.

What it fuses   Conv1d, Conv2d or Conv3d, then BatchNorm (SyncBatchNorm, FrozenBatchNorm, InstanceNorm with
                running statistics)
Equation        fold_output:  s (W x + b) + t = (s W) x + (s b + t),  s = gamma / sqrt(var + eps),
                t = beta - mean s
Exact when      always: any stride, padding, padding mode, dilation and groups
Refuses when    the channels differ, the statistics are missing or not finite, the weight is parametrized, the
                folded weight overflows its dtype
Before          conv (weight[, bias]) -> bn (weight, bias, running_mean, running_var)
After           conv (weight, bias) -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv", "norm")
def conv_bn(conv: Member, norm: Member) -> Rewrite:
    return conv.followed_by(norm)
