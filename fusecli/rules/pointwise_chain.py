"""Makes two linear layers with nothing between them into one, where that has fewer parameters.

What it fuses   two convolutions in a row of which one is pointwise (1x1, stride 1), or two linear layers
Equation        compose:  B (A x + a) + b = (B A) x + (B a + b)
Exact when      the second is pointwise; or the first is, and has no bias or the second pads no zeros
Refuses when    neither is pointwise, groups differ, the first has a bias under zero padding, the product has
                more parameters than the two (grows), something else reads the tensor between
Before          first (weight[, bias]) -> second (weight[, bias])
After           first (weight[, bias]), with the second's outputs and the larger kernel -> Identity
"""

from __future__ import annotations

from fusecli.algebra import compose
from fusecli.errors import require
from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv|linear", "conv|linear", equation="compose")
def pointwise_chain(first: Member, second: Member) -> Rewrite:
    product = compose(second.op, first.op, first.dtype)
    before = first.op.weight.numel() + second.op.weight.numel()
    require(
        product.weight.numel() < before,
        "grows",
        f"{first.path} and {second.path} have {before} weights, their product {product.weight.numel()}",
        remedy="keep both layers",
    )
    return first.becomes(product) + second.absorbed_into(first)
