"""Makes a plain weight of one that is computed from other tensors.

What it fuses   a layer with weight_norm, spectral_norm, a pruning mask or any torch.nn.utils.parametrize, on
                its weight or its bias; alone, or before it is folded with others
Equation        none:  W = g v / ||v|| (weight_norm),  W = W0 / (u^T W0 v) (spectral_norm, u and v as stored),
                W = m W0 (pruning),  W = f(W0) (a parametrization)
Exact when      in eval mode; computed in float64 from the stored tensors, rounded once after all folds
Refuses when    the spec does not say `bake: true` (the tensors that training goes on from are gone then), the
                layer has several names, something else reads its weight, a custom fuser takes it
Before          layer (weight_g, weight_v[, bias]), or parametrizations.weight.original0 and so on
After           layer (weight[, bias])
"""

from __future__ import annotations

from fusecli.rewrite import Plain, Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("computed", equation="none")
def bake(layer: Member) -> Rewrite:
    return Rewrite(layer.materialised, (Plain(layer.path),))
