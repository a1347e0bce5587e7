"""Folds a norm into the linear layer after it, also through a flatten.

What it fuses   BatchNorm (or another norm with running statistics), then Linear; all of them, where several
                read the norm
Equation        fold_input:  W (s x + t) + b = (W s) x + (W t + b); behind a flatten each channel of the norm
                arrives at many features
Exact when      always
Refuses when    the norm's channels are not the layer's features, something that is no layer reads the norm
                too
Before          bn (weight, bias, running_mean, running_var) -> linear (weight[, bias])
After           Identity -> linear (weight, bias)
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("norm", "linear", equation="fold_input")
def bn_linear(norm: Member, linear: Member) -> Rewrite:
    return linear.preceded_by(norm)
