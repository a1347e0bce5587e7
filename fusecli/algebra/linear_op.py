"""The value every dense, conv, transposed, grouped and depthwise layer becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fusecli.algebra.affine import ChannelAffine
from fusecli.algebra.geometry import Geometry
from fusecli.algebra.layout import pack
from fusecli.errors import require

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, eq=False)
class LinearOp:
    """W x + b, moved over the input by `geometry`. Calling the value is its meaning, in float64.

    Shapes: weight [g, o, i, *k] of any floating dtype, bias [g*o] or None; the output channel is
    axes (0, 1) and the input channel axes (0, 2), whatever the layer stores (see layout).
    Raises NotFoldable "shape" when weight, bias and geometry do not fit together, "dtype" for a
    weight or bias that is not floating point.
    """

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry

    def __post_init__(self) -> None:
        require(
            self.weight.ndim == 3 + self.geometry.rank,
            "shape",
            f"a weight [g, o, i, *k] of rank {self.geometry.rank} cannot be {list(self.weight.shape)}",
        )
        require(self.weight.is_floating_point(), "dtype", f"the weight holds {self.weight.dtype}")
        # A value carries no autograd history: weights are usually Parameters.
        object.__setattr__(self, "weight", self.weight.detach())
        if self.bias is not None:
            require(
                self.bias.shape == (self.out_channels,),
                "shape",
                f"bias {list(self.bias.shape)} does not fit {self.out_channels} output channels",
            )
            require(self.bias.is_floating_point(), "dtype", f"the bias holds {self.bias.dtype}")
            object.__setattr__(self, "bias", self.bias.detach())

    @property
    def rank(self) -> int:
        return self.geometry.rank

    @property
    def groups(self) -> int:
        return self.weight.shape[0]

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0] * self.weight.shape[1]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[0] * self.weight.shape[2]

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[3:])

    @property
    def unpadded(self) -> LinearOp:
        """The same layer on an input that has been padded already."""
        still = replace(self.geometry, padding=((0, 0),) * self.rank, padding_mode="zeros")
        return LinearOp(self.weight, self.bias, still)

    @property
    def pointwise(self) -> bool:
        """Whether each output position reads exactly the input at that position."""
        still = set(self.geometry.stride) <= {1} and not any(self.geometry.output_padding)
        return still and math.prod(self.kernel) == 1 and not self.geometry.padded

    def __call__(self, x: Tensor) -> Tensor:
        """W x + b, in float64. x is [n, c, *spatial]."""
        if x.ndim != 2 + self.rank or x.shape[1] != self.in_channels:
            raise ValueError(f"x is [n, {self.in_channels}] and {self.rank} axes, not {list(x.shape)}")
        bias = None if self.bias is None else self.bias.double()
        if self.rank == 0:
            return self._dense(x.double(), bias)
        storage = pack(self.weight.double(), self.geometry.transposed)
        return (self._transposed if self.geometry.transposed else self._conv)(x.double(), storage, bias)

    def _dense(self, x: Tensor, bias: Tensor | None) -> Tensor:
        grouped = torch.einsum("goi,ngi->ngo", self.weight.double(), x.unflatten(1, (self.groups, -1)))
        return grouped.flatten(1) if bias is None else grouped.flatten(1) + bias

    def _conv(self, x: Tensor, storage: Tensor, bias: Tensor | None) -> Tensor:
        at = self.geometry
        if at.padded:
            # F.pad counts its pairs from the last axis backwards.
            margins = [margin for pair in reversed(at.padding) for margin in pair]
            x = F.pad(x, margins, mode="constant" if at.padding_mode == "zeros" else at.padding_mode)
        return _CONV[self.rank](x, storage, bias, at.stride, 0, at.dilation, self.groups)

    def _transposed(self, x: Tensor, storage: Tensor, bias: Tensor | None) -> Tensor:
        at = self.geometry
        crop = [before for before, _ in at.padding]
        run = _CONV_TRANSPOSE[self.rank]
        return run(x, storage, bias, at.stride, crop, at.output_padding, self.groups, at.dilation)


def diagonal(f: ChannelAffine, groups: int, rank: int) -> LinearOp:
    """The layer that computes f: weight [g, o, i, 1, ...] with the scale where o = i and 0 elsewhere, bias t.

    A kernel of 1 with stride 1 and no padding; `f` has g*o channels and o = i. Source: Ding et al. 2021
    (RepVGG), section 3.3. Raises NotFoldable "shape" where the channels do not divide into the groups.
    """
    require(f.channels % groups == 0, "shape", f"{f.channels} channels do not divide into {groups} groups")
    weight = torch.diag_embed(f.scale.view(groups, -1)).view(groups, f.channels // groups, -1, *[1] * rank)
    still, unpadded = (1,) * rank, ((0, 0),) * rank
    return LinearOp(weight, f.shift if f.shifts else None, Geometry(still, unpadded, still))
