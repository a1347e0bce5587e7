"""Folds a norm into the norm before it: two affine maps in a row are one.

What it fuses   BatchNorm (or another norm with running statistics), then a norm, a scale or a gain
Equation        fold_output:  s2 (s1 x + t1) + t2 = (s2 s1) x + (s2 t1 + t2); the first norm keeps its
                statistics and gets gamma = s sqrt(var + eps), beta = t + mean s
Exact when      always
Refuses when    the first norm has no weight and bias, something else reads what it gives
Before          bn1 (weight, bias, running_mean, running_var) -> bn2 (weight, bias, running_mean, running_var)
After           bn1 (weight, bias, running_mean, running_var) -> Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("norm", "norm|scale|gain")
def bn_bn(first: Member, second: Member) -> Rewrite:
    return first.becomes_affine(second.affine.after(first.affine)) + second.absorbed_into(first)
