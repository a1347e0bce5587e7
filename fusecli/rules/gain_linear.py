"""Folds the gain of a LayerNorm or RMSNorm into all the layers that read it; and any scale before a layer.

What it fuses   the gain (and bias) at the end of a module: LayerNorm, RMSNorm, GroupNorm, a class of one's
                own; or a module that only scales and shifts (mean and std of the input); then the linear
                layers and convolutions that read it, every one of them
Equation        fold_input:  W (s x + t) + b = (W s) x + (W t + b)
Exact when      as bn_conv and bn_linear; a gain without a bias goes into a padded convolution too
Refuses when    something that is no layer reads it, a consumer's weight is tied to another (a language
                model's head and its embedding), zeros are padded and there is a shift
Before          norm (weight[, bias]) -> q, k, v (weight[, bias])
After           norm (weight of ones[, bias of zeros]) -> q, k, v (weight[, bias]); a scale becomes Identity
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("scale|gain", "conv|conv_transpose|linear", equation="fold_input")
def gain_linear(gain: Member, layer: Member) -> Rewrite:
    return layer.preceded_by(gain)
