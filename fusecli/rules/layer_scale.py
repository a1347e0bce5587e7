"""Folds a constant per-channel scale and shift into the layer before it.

What it fuses   a convolution, transposed convolution or linear layer, then a module that only multiplies by,
                divides by, adds or subtracts tensors of its own (LayerScale, an Affine), or such a gain in a
                module that does more
Equation        fold_output:  s (W x + b) + t = (s W) x + (s b + t)
Exact when      always; the constants lie along the layer's output channels, [c] or [c, 1, 1]
Refuses when    the constants lie along another axis, something else reads them or the layer's output
Before          layer (weight[, bias]) -> scale (gamma)
After           layer (weight[, bias]) -> Identity; of a module that does more, gamma becomes neutral
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("conv|conv_transpose|linear", "scale|gain")
def layer_scale(layer: Member, scale: Member) -> Rewrite:
    return layer.followed_by(scale)
