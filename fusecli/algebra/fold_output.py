"""A channel affine map after a linear layer."""

from __future__ import annotations

import torch

from fusecli.algebra.affine import ChannelAffine
from fusecli.algebra.blocks import scaled
from fusecli.algebra.linear_op import LinearOp
from fusecli.algebra.rounding import round_once
from fusecli.errors import require


def fold_output(op: LinearOp, f: ChannelAffine, dtype: torch.dtype = torch.float64) -> LinearOp:
    """f . W = (s W) x + (s b + t): the one layer that computes f(op(x)).

    Shapes: op.weight [g, o, i, *k], f of g*o channels; the result has the geometry and the memory
    order of `op`, and weight and bias in `dtype`, each rounded once from float64; no bias if neither has one.
    Always exact: an affine map of the output channel does not see where the inputs came from, so
    padding, stride, dilation, groups and transposition are free.
    Raises NotFoldable "shape" when f has not one entry per output channel; "overflow",
    "not-finite" and "dtype" as round_once does.
    Source: Jacob et al. 2018, equation 14, with the bias of the layer kept.
    """
    require(
        f.channels == op.out_channels,
        "shape",
        f"the layer has {op.out_channels} output channels, the affine map after it {f.channels}",
    )
    per_output = f.scale.view(*op.weight.shape[:2], *[1] * (1 + op.rank))
    weight = scaled(op.weight, per_output, dtype)
    if op.bias is None and not f.shifts:
        return LinearOp(weight, None, op.geometry)
    bias = f.shift if op.bias is None or op.weight.is_meta else f.scale * op.bias.double() + f.shift
    return LinearOp(weight, round_once(bias, dtype), op.geometry)
