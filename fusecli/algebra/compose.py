"""Two linear layers in a row."""

from __future__ import annotations

import torch
from torch import Tensor

from fusecli.algebra.fold_input import applied, passes_shift
from fusecli.algebra.linear_op import LinearOp
from fusecli.algebra.rounding import round_once
from fusecli.errors import require


def compose(outer: LinearOp, inner: LinearOp, dtype: torch.dtype = torch.float64) -> LinearOp:
    """B . A = (B A) x + (B a + b): the one layer that computes outer(inner(x)).

    Shapes: outer [g, o, m, *k], inner [g, m, i, *k]; the result is [g, o, i, *k] with the kernel and
    the geometry of the side that is not pointwise, the inner one if both are.
    Exactness: a pointwise layer acts on each position by itself, so it commutes with everything the
    other side does to positions: any stride, dilation, padding or transposition.
        outer pointwise   always: B sees every output of A, border or not.
        inner pointwise   when a = 0 or outer turns a constant into a constant (see fold_input):
                          B pads with 0 where A would have put a.
    Pointwise includes stride 1. A strided 1x1 drops positions, which no geometry of the other side
    alone expresses. Two layers with kernels need a larger one, and differ from it at the border.
    Groups must be equal: the product is block diagonal only if the blocks meet one to one.
    Raises NotFoldable "shape", "grouped", "not-pointwise", "padding-border", "transposed-shift";
    "overflow", "not-finite" and "dtype" as round_once does.
    Source: Ding et al. 2021 (Diverse Branch Block), transform III; Hu et al. 2022 (LoRA) for rank 0.
    """
    _require_chain(outer, inner)
    other, subscripts = (inner, "gom,gmiz->goiz") if outer.pointwise else (outer, "gomz,gmi->goiz")
    product = torch.einsum(subscripts, _taps(outer, other is outer), _taps(inner, other is inner))
    weight = round_once(product.reshape(*product.shape[:3], *other.kernel), dtype)
    bias = _bias(outer, inner)
    return LinearOp(weight, None if bias is None else round_once(bias, dtype), other.geometry)


def _require_chain(outer: LinearOp, inner: LinearOp) -> None:
    require(
        (outer.rank, outer.in_channels) == (inner.rank, inner.out_channels),
        "shape",
        f"{inner.out_channels} channels of rank {inner.rank} do not feed "
        f"{outer.in_channels} of rank {outer.rank}",
    )
    require(
        outer.groups == inner.groups,
        "grouped",
        f"{inner.groups} groups feed {outer.groups}: the product has no blocks of either kind",
        remedy="keep both layers",
    )
    require(
        outer.pointwise or inner.pointwise,
        "not-pointwise",
        f"neither layer is pointwise: kernels {inner.kernel} and {outer.kernel}, "
        f"strides {inner.geometry.stride} and {outer.geometry.stride}",
        remedy="keep both layers",
    )


def _taps(op: LinearOp, keep: bool) -> Tensor:
    """The weight as [g, o, i, z] with all taps on one axis, or as [g, o, i] when its only tap is not kept."""
    flat = op.weight.double().reshape(*op.weight.shape[:3], -1)
    return flat if keep else flat[..., 0]


def _bias(outer: LinearOp, inner: LinearOp) -> Tensor | None:
    bias = None if outer.bias is None else outer.bias.double()
    if inner.bias is None:
        return bias
    shift = inner.bias.double()
    if not passes_shift(outer, shift, "the bias of the inner layer"):
        return bias
    carried = applied(outer.weight, shift.view(outer.groups, 1, -1, *[1] * outer.rank))
    return carried if bias is None else carried + bias
