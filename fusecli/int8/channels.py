"""How near each channel of a tensor is to that of another, so that no large one hides a small one.

A channel's error is measured against its own power, sum x^2 over all samples. Where the channel moves by less
than eight bits of its own can tell apart, 1/255 of its largest value, or is below a millionth of the largest
channel, it is one number in float already, and nothing of it can be lost: it is measured against the mean
power of all channels where that is larger, and has no cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of a channel's largest value: what moves by less is one number, for eight bits of its own or for anybody.
ONE_NUMBER, STILL = 1 / 255, 1e-3
# Of the largest channel: float32 itself adds up sums of the layer in front to no less.
NOTHING = 1e-6


class Channels:
    """Sums over everything seen of one tensor, for each channel of one axis.

    axis   counted from the end, so that -1 is the last one
    whole  False where the axis changed its size: it holds samples, and no channels
    """

    def __init__(self, axis: int) -> None:
        self.axis, self.whole = axis, True
        self.sums: Tensor | None = None  # [4, c]: signal, other, dot, noise
        self.ends: Tensor | None = None  # [4, c]: the largest of x, -x, y, -y

    def add(self, x: Tensor, y: Tensor) -> None:
        """Both in float64 and of one shape."""
        x, y = (v.movedim(self.axis, -1).reshape(-1, v.shape[self.axis]) for v in (x, y))
        sums = torch.stack([(x * x).sum(0), (y * y).sum(0), (x * y).sum(0), (x - y).square().sum(0)])
        ends = torch.stack([value.amax(0) for value in (x, -x, y, -y)])
        if self.sums is None or self.ends is None:
            self.sums, self.ends = sums, ends
        elif self.sums.shape == sums.shape:
            self.sums, self.ends = self.sums + sums, self.ends.maximum(ends)
        else:
            self.whole = False

    def moves(self, share: float) -> Tensor:
        """Which channels move in float by more than that share of their largest value, and are there, [c]."""
        assert self.sums is not None
        assert self.ends is not None
        signal, (high, low, _, _) = self.sums[0], self.ends
        moving: Tensor = high + low > share * high.maximum(low)
        return moving & (signal > NOTHING**2 * signal.max())

    @property
    def varies(self) -> Tensor:
        return self.moves(ONE_NUMBER)

    @property
    def constant(self) -> Tensor:
        """Which channels are one number in int8 and not in float, [c]: worth knowing."""
        assert self.ends is not None
        return self.moves(STILL) & (self.ends[2] + self.ends[3] == 0)

    @property
    def lost(self) -> Tensor:
        """Those of them that vary by more than eight bits need: int8 could have kept them, [c]."""
        return self.constant & self.varies

    @property
    def sqnr(self) -> Tensor:
        """In dB, [c]; inf where nothing is lost, -inf where a value is not finite."""
        assert self.sums is not None
        signal, noise = self.sums[0], self.sums[3]
        power = torch.where(self.varies, signal, signal.clamp(min=float(signal.mean())))
        value = torch.where(noise == 0, torch.inf, 10 * (power / noise).log10())
        return torch.where((signal + noise).isfinite(), value, -torch.inf)

    @property
    def cosine(self) -> Tensor:
        """Of each channel as one vector over all samples, [c]; 1 for what does not vary."""
        assert self.sums is not None
        signal, other, dot, noise = self.sums
        lengths = (signal * other).sqrt()
        value = torch.where(lengths > 0, dot / lengths, 0.0).clamp(-1, 1)
        value = torch.where((noise == 0) | ~self.varies, 1.0, value)
        return torch.where((signal + noise).isfinite(), value, -1.0)


def channel_axes(value: Tensor) -> list[int]:
    """The axes of an output that may hold channels, from the end: the last, and of [n, c, *] the second."""
    second = 1 - value.ndim
    return [-1] if value.ndim < 3 else [second, -1]
