"""Folds a per-channel scale and shift into the norm after it.

What it fuses   a module that only scales and shifts (or the gain at the end of one), then a norm
Equation        fold_input:  s2 (s1 x + t1) + t2 = (s2 s1) x + (s2 t1 + t2), as in bn_bn
Exact when      always
Refuses when    the norm has no weight and bias, something else reads what the scale gives
Before          scale (mean, std) -> bn (weight, bias, running_mean, running_var)
After           Identity -> bn (weight, bias, running_mean, running_var)
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("norm|scale|gain", "norm", equation="fold_input")
def scale_bn(scale: Member, norm: Member) -> Rewrite:
    return norm.becomes_affine(norm.affine.after(scale.affine)) + scale.passed_to(norm)
