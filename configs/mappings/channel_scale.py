"""A layer of one's own, a network that uses it, and the function that fuses it."""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy

import torch
from torch import Tensor, nn


class ChannelScale(nn.Module):
    """Multiplies each channel of [n, c, h, w] by a number of its own; no rule of fusecli knows it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None]


def build() -> nn.Module:
    modules = {"conv": nn.Conv2d(3, 8, 3, padding=1), "scale": ChannelScale(8), "act": nn.GELU()}
    return nn.Sequential(OrderedDict(modules))


def fuse_conv_scale(is_qat: bool, conv: nn.Conv2d, scale: ChannelScale) -> nn.Module:
    """The convolution with the scale in its weight and bias: called as torch.ao calls its fuser methods."""
    fused = deepcopy(conv)
    with torch.no_grad():
        factor = scale.weight.double()
        fused.weight.copy_(conv.weight.double() * factor[:, None, None, None])
        fused.bias.copy_(conv.bias.double() * factor)
    return fused
