"""Folds a norm into the convolution after it.

What it fuses   BatchNorm (or another norm with running statistics), then Conv1d-3d or ConvTranspose1d-3d; all
                of them, where several read the norm
Equation        fold_input:  W (s x + t) + b = (W s) x + (W t + b)
Exact when      the convolution pads with nothing, or by repeating its input (reflect, replicate, circular),
                or the shift is 0; a transposed convolution only with kernel 1, or a shift of 0
Refuses when    zeros are padded and there is a shift (padding-border), the transposed kernel is larger
                (transposed-shift), something that is no layer reads the norm too
Before          bn (weight, bias, running_mean, running_var) -> conv (weight[, bias])
After           Identity -> conv (weight, bias)
"""

from __future__ import annotations

from fusecli.rewrite import Rewrite
from fusecli.rules import rule
from fusecli.rules._member import Member


@rule("norm", "conv|conv_transpose", equation="fold_input")
def bn_conv(norm: Member, conv: Member) -> Rewrite:
    return conv.preceded_by(norm)
