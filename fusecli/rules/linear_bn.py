"""Folds a norm with running statistics into the linear layer before it.

What it fuses   Linear, then BatchNorm1d (with or without affine parameters)
Equation        fold_output:  s (W x + b) + t = (s W) x + (s b + t)
Exact when      the norm's channel axis is the layer's output axis: [n, c] inputs. On [n, l, c] BatchNorm1d
                normalises axis 1, which is another function
Refuses when    as conv_bn
Before          linear (weight[, bias]) -> bn
After           linear (weight, bias) -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("linear", "norm")
def linear_bn(linear: Member, norm: Member) -> Rewrite:
    return linear.followed_by(norm)
