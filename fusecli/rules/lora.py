"""Adds a low-rank adapter (LoRA) to the weight of the layer that it stands beside.

What it fuses   Linear or Conv1d, Conv2d, Conv3d, and the pair lora_A, lora_B of an adapter's file
Equation        sum_parallel of compose:  W x + b + s B(A x) = (W + s B A) x + b
Exact when      always: A has the layer's geometry, B is pointwise; the sum is rounded once, after all folds
Refuses when    the weight is tied or computed, the layer is grouped, transposed or of another kind, shapes do
                not fit, the adapter is no such sum (DoRA, embeddings, saved modules)
Before          layer (weight[, bias]), and in the adapter's file lora_A [r, i, *k], lora_B [o, r]
After           layer (weight[, bias])
"""

from __future__ import annotations

from fusecli.algebra import compose, fold_output, sum_parallel
from fusecli.graph.lift import lowered
from fusecli.rewrite import Plain, Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("adapted", equation="sum_parallel")
def lora(layer: Member) -> Rewrite:
    base, down, up, scale = layer.adapter
    merged = sum_parallel(base, fold_output(compose(up, down), scale))
    return Rewrite(lowered(layer.path, merged), (Plain(layer.path),))
