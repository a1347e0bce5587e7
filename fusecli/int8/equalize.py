"""Cross-layer equalization of an exported graph, by powers of two: the same function, bit for bit.

For two layers in a row with f(x / s) = f(x) / s between them, s > 0 for each channel:

    y = W2 f(W1 x + b1) + b2 = (W2 S) f(S^-1 W1 x + S^-1 b1) + b2        S = diag(s)

With r1_i the range max |w| of row i of W1 and r2_i that of column i of W2, s_i = sqrt(r1_i / r2_i) makes both
sqrt(r1_i r2_i); repeated over all pairs, that converges. Source: Nagel et al. 2019, Data-Free Quantization
Through Weight Equalization and Bias Correction, arXiv:1906.04721, section 4.1.

Here s_i is the nearest power of two. That leaves r1_i and r2_i within a factor of two of each other, half a
bit from the optimum, and in exchange nothing is ever rounded: no weight, and in a run no activation.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fusecli.int8.numbers import telling_size
from fusecli.int8.pairs import Pair, pairs
from fusecli.int8.torchao import quiet
from fusecli.int8.watching import run
from fusecli.sample import Sample, tensors_in

# Beyond the ranges of real networks, and it leaves activations far from the ends of float32 and bfloat16.
_LARGEST_EXPONENT = 32


@dataclass(frozen=True)
class Equalized:
    """What was done to a pair: the largest over the smallest channel range of the first's rows, the second's
    columns, before and after (channels of zeros do not count), and how many channels were scaled."""

    first: str
    second: str
    rows_before: float
    rows_after: float
    columns_before: float
    columns_after: float
    scaled: int


def equalize(graph: fx.GraphModule, rounds: int = 100) -> tuple[Equalized, ...]:
    """Replaces the weights and biases of all pairs by equalized ones, exactly; for each pair what it did.

    The graph gets new tensors and no old one is written to, so a copy that shares them is safe.
    Rounds over all pairs end when no scale changes any more, which a second call then confirms.
    """
    found = pairs(graph)
    old = {name: operator.attrgetter(name)(graph) for pair in found for name in pair.tensors}
    new = {name: tensor.detach().to(torch.float64, copy=True).contiguous() for name, tensor in old.items()}
    before = [(_spread(pair.rows(new)), _spread(pair.columns(new))) for pair in found]
    moved = [torch.zeros(pair.rows(new).shape[:2].numel(), dtype=torch.float64) for pair in found]
    dtypes = {name: tensor.dtype for name, tensor in old.items()}
    for _ in range(rounds):
        moves = [_move(pair, new, dtypes, total) for pair, total in zip(found, moved, strict=True)]
        if not any(moves):
            break
    for name in old:
        _replace(graph, name, old[name], new[name])
    done = zip(found, before, moved, strict=True)
    return tuple(_record(pair, new, ranges, total) for pair, ranges, total in done)


def equalized(graph: fx.GraphModule) -> tuple[fx.GraphModule, tuple[Equalized, ...]]:
    """An equalized copy of the graph, its nodes of the same names, and for each pair what was done.

    The copy shares every parameter that was not scaled; the graph that is given stays as it is.
    """
    kept = {id(parameter): parameter for parameter in graph.parameters()}
    with quiet():  # torch warns of its own tree specs when they are copied
        twin = copy.deepcopy(graph, kept)
    return twin, equalize(twin)


def unequal(before: fx.GraphModule, after: fx.GraphModule, sample: Sample) -> float:
    """The largest max|a-b| / max|a| of the outputs of both graphs, run in float64; inf where not finite.

    Weights, constants and inputs are cast as they are read, and a dtype that an op names becomes float64.
    """
    worst = 0.0
    wide = sample.copy(torch.float64)
    ends = (tensors_in(run(_InFloat64(graph), wide)) for graph in (before, after))
    for a, b in zip(*ends, strict=True):
        if a.numel():
            gap = (a.double() - b.double()).where(a != b, 0.0)  # infinities may be equal
            size, error = telling_size(a, b), float(gap.abs().max())
            ratio = error / size if size else (math.inf if error else 0.0)
            worst = max(worst, ratio if math.isfinite(ratio) else math.inf)
    return worst


class _InFloat64(fx.Interpreter):
    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None  # it asserts the dtype of the export
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        return super().call_function(target, args, kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def channel_ranges(view: Tensor) -> Tensor:
    """max |w| of each channel [c] of a view [g, c/g, ...]."""
    return view.abs().amax((2, 3, 4)).flatten()


def _spread(view: Tensor) -> float:
    ranges = channel_ranges(view)
    ranges = ranges[ranges > 0]
    return float(ranges.max() / ranges.min()) if len(ranges) else 1.0


def _move(
    pair: Pair, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], total: Tensor
) -> bool:
    """One step of the paper: the scales of one pair, applied in float64; whether there was anything to move.

    total  [c], the exponents so far; is added to
    """
    rows, columns = pair.rows(tensors), pair.columns(tensors)
    wish = (channel_ranges(rows).log2() - channel_ranges(columns).log2()) / 2
    # Ranges a factor of two apart stay so: by the rounding of log2 they would change places for ever.
    wish = wish.round().where(wish.abs() > 0.5 + 1e-9, 0.0)
    # Dead channels, zeros on either side, keep their scale: log2 makes them infinite or NaN.
    wish = wish.nan_to_num(0.0, 0.0, 0.0)
    exponents = (total + wish).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT) - total
    if not exponents.any():
        return False
    down = [(rows, dtypes[pair.first.weight])]
    if pair.first.bias:
        bias = tensors[pair.first.bias].view(*rows.shape[:2], 1, 1, 1)
        down.append((bias, dtypes[pair.first.bias]))
    for view, dtype in down:
        exponents = -_within(-exponents, view, dtype)
    exponents = _within(exponents, columns, dtypes[pair.second.weight])
    # ldexp of the standard library: torch's pow and exp2 promise no exact powers of two.
    scales = torch.tensor([math.ldexp(1.0, int(e)) for e in exponents.tolist()], dtype=torch.float64)
    for view, _ in down:
        view.div_(scales.view(*rows.shape[:2], 1, 1, 1))
    columns.mul_(scales.view(*columns.shape[:2], 1, 1, 1))
    total += exponents
    return bool(exponents.any())


def _within(exponents: Tensor, view: Tensor, dtype: torch.dtype) -> Tensor:
    """The exponents [c], nearer to 0 where view * 2^e would leave the normal numbers of `dtype`."""
    limits, size = torch.finfo(dtype), view.abs()
    largest = channel_ranges(view).log2()
    smallest = size.where(size > 0, math.inf).amin((2, 3, 4)).flatten().log2()
    highest = (math.log2(limits.max) - largest).floor() - 1
    lowest = (math.log2(limits.tiny) - smallest).ceil() + 1
    return exponents.minimum(highest.clamp(min=0)).maximum(lowest.clamp(max=0))


def _replace(graph: fx.GraphModule, name: str, old: Tensor, new: Tensor) -> None:
    stored = torch.empty_like(old, requires_grad=False).copy_(new)
    if torch.equal(stored, old):
        return
    owner, _, leaf = name.rpartition(".")
    fresh = nn.Parameter(stored, old.requires_grad) if isinstance(old, nn.Parameter) else stored
    setattr(graph.get_submodule(owner), leaf, fresh)


def _record(
    pair: Pair, tensors: Mapping[str, Tensor], before: tuple[float, float], total: Tensor
) -> Equalized:
    after = _spread(pair.rows(tensors)), _spread(pair.columns(tensors))
    names = pair.first.node.name, pair.second.node.name
    return Equalized(*names, before[0], after[0], before[1], after[1], int(total.count_nonzero()))
