"""Two linear layers that read the same input and whose outputs are added."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusecli.algebra.geometry import Geometry
from fusecli.algebra.linear_op import LinearOp
from fusecli.algebra.rounding import round_once
from fusecli.errors import require


def sum_parallel(a: LinearOp, b: LinearOp, dtype: torch.dtype = torch.float64) -> LinearOp:
    """A + B = (A + B) x + (a + b): the one layer that computes a(x) + b(x).

    Shapes: both weights [g, o, i, *k], *k may differ; the smaller kernel gets taps of 0.
    Exactness, per axis: output n of a conv reads tap u at s n + d u - p, p the padding before, so
    with e more taps before and r more after it is the same layer with p + d e before, q + d r after.
    A transposed conv sends input n through tap u to the same place, mirrored, and obeys the same
    rule. So a and b add up when both grow to one kernel at P = max(p), Q = max(q):
        (P - p) / d = e and (Q - q) / d = r are whole for both, and k + e + r is equal for both,
    which also makes the outputs equally long for every input. A 3x3 padded by 1 and an unpadded 1x1
    do (e = r = 1); kernels centred differently do not. Where k = 1 the dilation means nothing.
    A tap of 0 does not care what padding it reads, so an unpadded layer joins any padding mode;
    two padded ones must agree on it.
    Raises NotFoldable "shape" (channels, rank), "different-groups", "different-stride",
    "different-dilation", "different-output-padding", "different-padding-mode", "transposed-mix",
    "not-aligned"; "overflow", "not-finite" and "dtype" as round_once does.
    Source: Ding et al. 2021 (RepVGG), section 3.3; Ding et al. 2021 (Diverse Branch Block), transform VI.
    """
    _require_comparable(a, b)
    at = _common(a, b)
    # Of two values of which one has no numbers, the sum has none.
    device = "meta" if a.weight.is_meta or b.weight.is_meta else a.weight.device
    weight = round_once(_grown(a, at).to(device) + _grown(b, at).to(device), dtype)
    biases = [op.bias.double().to(device) for op in (a, b) if op.bias is not None]
    bias = round_once(torch.stack(biases).sum(0), dtype) if biases else None
    return LinearOp(weight, bias, at)


def _require_comparable(a: LinearOp, b: LinearOp) -> None:
    for code, left, right in (
        ("shape", (a.rank, a.in_channels, a.out_channels), (b.rank, b.in_channels, b.out_channels)),
        ("different-groups", a.groups, b.groups),
        ("transposed-mix", a.geometry.transposed, b.geometry.transposed),
        ("different-stride", a.geometry.stride, b.geometry.stride),
        ("different-output-padding", a.geometry.output_padding, b.geometry.output_padding),
    ):
        require(left == right, code, f"the two layers do not add up: {left} and {right}", remedy=_KEEP)
    modes = {op.geometry.padding_mode for op in (a, b) if op.geometry.padded}
    require(len(modes) <= 1, "different-padding-mode", f"the borders differ: {sorted(modes)}", remedy=_KEEP)


def _common(a: LinearOp, b: LinearOp) -> Geometry:
    """The geometry of the sum; refuses when either layer cannot grow into it."""
    dilation = tuple(_dilation(a, b, axis) for axis in range(a.rank))
    padding = tuple(
        (max(p, other_p), max(q, other_q))
        for (p, q), (other_p, other_q) in zip(a.geometry.padding, b.geometry.padding, strict=True)
    )
    padded = a if a.geometry.padded else b
    at = Geometry(
        a.geometry.stride,
        padding,
        dilation,
        a.geometry.transposed,
        a.geometry.output_padding,
        padded.geometry.padding_mode,
    )
    sizes = [_grown_kernel(op, at) for op in (a, b)]
    require(
        None not in sizes and sizes[0] == sizes[1],
        "not-aligned",
        f"kernel {a.kernel} padded by {a.geometry.padding} and kernel {b.kernel} padded by "
        f"{b.geometry.padding} do not share a centre",
        remedy=_KEEP,
    )
    return at


def _dilation(a: LinearOp, b: LinearOp, axis: int) -> int:
    # The dilation of a single tap means nothing.
    meant = {op.geometry.dilation[axis] for op in (a, b) if op.kernel[axis] > 1}
    require(len(meant) <= 1, "different-dilation", f"dilations {sorted(meant)} on axis {axis}", remedy=_KEEP)
    return meant.pop() if meant else a.geometry.dilation[axis]


def _margin(op: LinearOp, at: Geometry, axis: int) -> tuple[int, int]:
    """The padding that `at` has beyond `op`'s own, before and after."""
    (p, q), (before, after) = op.geometry.padding[axis], at.padding[axis]
    return before - p, after - q


def _grown_kernel(op: LinearOp, at: Geometry) -> tuple[int, ...] | None:
    margins = [_margin(op, at, axis) for axis in range(op.rank)]
    if any(margin % d for pair, d in zip(margins, at.dilation, strict=True) for margin in pair):
        return None
    return tuple(k + sum(pair) // d for k, pair, d in zip(op.kernel, margins, at.dilation, strict=True))


def _grown(op: LinearOp, at: Geometry) -> Tensor:
    # F.pad counts its pairs from the last axis backwards.
    taps = [m // at.dilation[axis] for axis in reversed(range(op.rank)) for m in _margin(op, at, axis)]
    return F.pad(op.weight.double(), taps) if any(taps) else op.weight.double()


_KEEP = "keep both layers"
