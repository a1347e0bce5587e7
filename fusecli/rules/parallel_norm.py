"""Makes a layer and a norm of the same tensor that are added into one layer (the identity branch of RepVGG).

What it fuses   a layer with as many outputs as inputs, and a norm, a scale or an nn.Identity beside it that
                reads the same tensor, with a sum behind them
Equation        sum_parallel:  (W x + b) + (s x + t) = (W + diag(s)) x + (b + t)
Exact when      the layer's stride is 1 and its kernel centred
Refuses when    it is not, something else reads one of the branches, the input itself is added by an operator
                (bare-identity)
Before          layer (weight[, bias]), bn (weight, bias, running_mean, running_var)
After           layer (weight[, bias]), Zero: forward goes on to add a scalar 0
"""

from __future__ import annotations

from fusecli.algebra import diagonal, sum_parallel
from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv|linear", "norm|scale|nothing", equation="sum_parallel")
def parallel_norm(layer: Member, norm: Member) -> Rewrite:
    both = sum_parallel(layer.op, diagonal(norm.affine, layer.op.groups, layer.op.rank), layer.dtype)
    return layer.becomes(both) + norm.silenced(layer)
