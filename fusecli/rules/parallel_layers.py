"""Makes two layers that read the same tensor and are added into one (RepVGG, MobileOne, RepLK, ACNet).

What it fuses   two convolutions, transposed convolutions or linear layers with one input and a sum behind
                them
Equation        sum_parallel:  (A x + a) + (B x + b) = (A + B) x + (a + b); the smaller kernel gets taps of 0
Exact when      stride, groups and dilation are the same and both kernels have the same centre
Refuses when    they differ, something else reads one of the branches, the layer would have to grow and its
                class is not known
Before          a (weight[, bias]), b (weight[, bias])
After           a (weight[, bias]), Zero: forward goes on to add what b gives, a scalar 0
"""

from __future__ import annotations

from fusecli.algebra import sum_parallel
from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv|conv_transpose|linear", "conv|conv_transpose|linear", equation="sum_parallel")
def parallel_layers(layer: Member, other: Member) -> Rewrite:
    return layer.becomes(sum_parallel(layer.op, other.op, layer.dtype)) + other.silenced(layer)
