"""A channel affine map before a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fusecli.algebra.affine import ChannelAffine
from fusecli.algebra.blocks import blocks, scaled
from fusecli.algebra.linear_op import LinearOp
from fusecli.algebra.rounding import round_once
from fusecli.errors import require


def fold_input(op: LinearOp, f: ChannelAffine, dtype: torch.dtype = torch.float64) -> LinearOp:
    """W . f = (W s) x + (W t + b): the one layer that computes op(f(x)).

    Shapes: op.weight [g, o, i, *k], f of g*i channels; W t sums over i and every tap of *k. The
    result has a bias if `op` has one or f shifts and the geometry passes that on.
    Exact when t is 0, and when every output reads all taps of real input: no padding, or padding
    that repeats input (reflect, replicate, circular), because s x + t of a repeated x is repeated
    too. Zero padding is not s 0 + t, and a transposed conv gives each output a different subset of
    its taps, so that W t would depend on the position.
    Raises NotFoldable "padding-border" and "transposed-shift" for those two; "shape" when f has not
    one entry per input channel; "overflow", "not-finite" and "dtype" as round_once does. On meta
    tensors t is taken to be 0 where it must be, and not 0 elsewhere.
    """
    require(
        f.channels == op.in_channels,
        "shape",
        f"the layer has {op.in_channels} input channels, the affine map before it {f.channels}",
    )
    groups, _, inputs = op.weight.shape[:3]
    per_input = (groups, 1, inputs, *[1] * op.rank)
    weight = scaled(op.weight, f.scale.view(per_input), dtype)
    bias = None if op.bias is None else op.bias.double()
    if f.shifts and passes_shift(op, f.shift, "the shift of the affine map"):
        carried = applied(op.weight, f.shift.view(per_input))
        bias = carried if bias is None else carried + bias
    return LinearOp(weight, None if bias is None else round_once(bias, dtype), op.geometry)


def passes_shift(op: LinearOp, shift: Tensor, what: str) -> bool:
    """Whether `shift` [g*i], a constant added to every input of `op`, reaches its output as a constant.

    False where `op` passes none on and there is none; raises NotFoldable where there is one.
    """
    border, scatter = op.geometry.zero_bordered, op.geometry.transposed and not op.pointwise
    # By the geometry alone where that permits: which tensors a layer has must not depend on their numbers.
    if not (border or scatter):
        return True
    if shift.is_meta or not bool(shift.any()):
        return False
    channel = int(shift.nonzero()[0])
    evidence = (f"{what} is {shift[channel].item():.6g} on channel {channel}",)
    require(
        not border,
        "padding-border",
        "outputs at the border read zeros that the shift never reached",
        evidence=evidence,
        remedy="keep both layers",
    )
    require(
        not scatter,
        "transposed-shift",
        "each output of a transposed conv sums other taps, so the shift does not become a bias",
        evidence=evidence,
        remedy="keep both layers",
    )
    return True


def applied(weight: Tensor, shift: Tensor) -> Tensor:
    """W t [g*o], in float64: what a constant input adds to the output, summed over i and the taps.

    Shapes: weight [g, o, i, *k], shift [g, 1, i, 1, ...] in float64.
    """
    total = shift.new_zeros(*weight.shape[:2], *[1] * (weight.ndim - 2))
    summed = tuple(range(2, weight.ndim))
    for part, constant, sums in blocks(weight, shift, total):
        sums += torch.mul(part, constant).sum(summed, keepdim=True)
    return total.flatten()
