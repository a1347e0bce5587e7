"""The value every norm becomes at inference: one scale and one shift per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fusecli.errors import require


@dataclass(frozen=True, eq=False)
class ChannelAffine:
    """y[n, c, ...] = scale[c] * x[n, c, ...] + shift[c], in float64.

    Shapes: scale [c], shift [c]. Every value is finite, except on meta tensors, which have none.
    shifts: whether there is a shift at all. Where there is none by construction (a gain, a LayerScale) no
    layer needs a bias for it, and that is known without numbers; the shift is then 0.
    Raises TypeError unless both are float64; NotFoldable "shape" when they are not two vectors of
    one length, "bad-statistics" when a value is NaN or infinite.
    """

    scale: Tensor
    shift: Tensor
    shifts: bool = True

    def __post_init__(self) -> None:
        if not self.scale.dtype == self.shift.dtype == torch.float64:
            raise TypeError(f"scale and shift are float64, not {self.scale.dtype} and {self.shift.dtype}")
        require(
            self.scale.ndim == 1 and self.scale.shape == self.shift.shape,
            "shape",
            f"scale {list(self.scale.shape)} and shift {list(self.shift.shape)} are no vectors of one length",
        )
        # A value carries no autograd history: gamma is usually a Parameter.
        object.__setattr__(self, "scale", self.scale.detach())
        object.__setattr__(self, "shift", self.shift.detach())
        if not self.scale.is_meta:
            _require_finite(torch.stack((self.scale, self.shift)), ("scale", "shift"))

    @property
    def channels(self) -> int:
        return self.scale.shape[0]

    def spread(self, channels: Tensor, *, shifts: bool = True) -> ChannelAffine:
        """This map on another list of channels: entry i is that of channel `channels[i]`, or the identity
        where that is negative. Without `shifts` the scales alone.
        """
        shifts = shifts and self.shifts
        if self.scale.is_meta:  # torch would import its compiler to index what holds no numbers
            empty = self.scale.new_empty(channels.shape)
            return ChannelAffine(empty, empty, shifts)
        present = (channels >= 0).to(self.scale.device)
        at = channels.clamp(min=0).to(self.scale.device)
        scale = torch.where(present, self.scale[at], 1.0)
        shift = torch.where(present, self.shift[at], 0.0) if shifts else torch.zeros_like(scale)
        return ChannelAffine(scale, shift, shifts)

    @property
    def root(self) -> Tensor:
        """For each channel the input that the map turns into 0: -t / s [c].

        Raises NotFoldable "padding-border" where there is none: a scale of 0 with a shift. Where both are 0
        any input does, and this is 0.
        """
        if self.scale.is_meta:
            return torch.empty_like(self.scale)
        flat = self.scale == 0
        channel = (
            int((flat & (self.shift != 0)).nonzero()[0]) if bool((flat & (self.shift != 0)).any()) else -1
        )
        require(
            channel < 0,
            "padding-border",
            f"no padding becomes 0 on channel {channel}: its scale is 0, its shift {self.shift[channel]:.6g}",
            remedy="keep both layers",
        )
        return torch.where(flat, 0.0, -self.shift / torch.where(flat, 1.0, self.scale))

    def after(self, first: ChannelAffine) -> ChannelAffine:
        """This map of `first`: s (s1 x + t1) + t = (s s1) x + (s t1 + t)."""
        require(
            self.channels == first.channels,
            "shape",
            f"a map of {self.channels} channels cannot follow one of {first.channels}",
        )
        return ChannelAffine(
            self.scale * first.scale, self.scale * first.shift + self.shift, self.shifts or first.shifts
        )

    def __call__(self, x: Tensor) -> Tensor:
        """s x + t, in float64. x is [n, c, *spatial]."""
        if x.shape[1] != self.channels:
            raise ValueError(f"x has {x.shape[1]} channels on axis 1, the affine map has {self.channels}")
        per_channel = (-1, *[1] * (x.ndim - 2))
        return x.double() * self.scale.view(per_channel) + self.shift.view(per_channel)


def batch_norm(
    mean: Tensor, var: Tensor, eps: float, gamma: Tensor | None = None, beta: Tensor | None = None
) -> ChannelAffine:
    """gamma (x - mean) / sqrt(var + eps) + beta: scale = gamma / sqrt(var + eps), shift = beta - mean scale.

    Shapes: mean, var, gamma, beta [c], any floating dtype. Absent gamma is 1, absent beta is 0.
    Raises NotFoldable "shape" when the sizes differ; "bad-statistics", naming the first such channel
    and its value, for NaN or Inf anywhere, a negative variance or var + eps = 0. A variance of 0 or a
    denormal one, and a gamma of 0 or below, are right as they stand.
    Exact to the last bit on any machine: five float64 operations, each rounded by IEEE 754 (rsqrt and
    fused multiply-add are not, so they are not used).
    Source: Ioffe and Szegedy 2015, algorithm 2.
    """
    gamma = torch.ones_like(mean) if gamma is None else gamma
    beta = torch.zeros_like(mean) if beta is None else beta
    given = (mean, var, gamma, beta)
    require(
        mean.ndim == 1 and all(tensor.shape == mean.shape for tensor in given),
        "shape",
        f"the statistics are no vectors of one length: {[list(tensor.shape) for tensor in given]}",
    )
    if mean.is_meta:
        return ChannelAffine(*torch.empty(2, *mean.shape, dtype=torch.float64, device="meta"))
    rows = torch.stack(given).detach().double()
    _require_finite(rows, ("running_mean", "running_var", "weight", "bias"))
    mean, var, gamma, beta = rows
    _require_variance(var, float(eps))
    scale = gamma / (var + eps).sqrt()
    return ChannelAffine(scale, beta - mean * scale)


def _require_finite(rows: Tensor, names: tuple[str, ...]) -> None:
    """Guard: rows [len(names), c] hold neither NaN nor Inf."""
    # A sum hands both on and is one operation, isfinite is five; a sum that overflows is looked at again.
    if math.isfinite(rows.sum()):
        return
    finite = torch.isfinite(rows)
    if bool(finite.all()):
        return
    channel, row = (~finite).T.nonzero()[0].tolist()
    value = rows[row, channel].item()
    require(False, "bad-statistics", f"{names[row]} of channel {channel} is {value}", remedy=_RETRAIN)


def _require_variance(var: Tensor, eps: float) -> None:
    require(math.isfinite(eps) and eps >= 0, "bad-statistics", f"eps is {eps}")
    smallest = float(var.min()) if var.numel() else math.inf
    if smallest >= 0 and smallest + eps > 0:
        return
    usable = (var >= 0) & (var + eps > 0)
    channel = int((~usable).nonzero()[0])
    value = var[channel].item()
    require(
        False, "bad-statistics", f"running_var of channel {channel} is {value}, eps is {eps}", remedy=_RETRAIN
    )


_RETRAIN = "recompute the running statistics on clean data, or leave this norm as it is"
