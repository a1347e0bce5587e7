"""Convolutions that pad with a value of their own for each input channel.

A norm before a convolution can only be folded into it if what is padded is what the norm would make of its
input there: zeros after the norm are -shift / scale before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    _Conv = nn.Conv2d
else:
    _Conv = object


class _Bordered(_Conv):
    """Pads x [n, c, *spatial] or [c, *spatial] with `border` [c], then convolves; padding is what it was."""

    border: Tensor

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        margins = self._reversed_padding_repeated_twice  # from the last axis backwards, before and after
        sizes, rank = list(input.shape), weight.ndim - 2  # with a batch in front, or without
        inner: list[slice] = [slice(None)] * len(sizes)
        for axis in range(rank):
            before, after = margins[2 * axis : 2 * axis + 2]
            size = sizes[-1 - axis]
            inner[-1 - axis] = slice(before, before + size)
            sizes[-1 - axis] = before + size + after
        per_channel = self.border.view(-1, *[1] * rank)
        padded = per_channel.to(input.dtype).expand(sizes).clone()
        padded[tuple(inner)] = input
        run = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[rank - 1]
        out: Tensor = run(padded, weight, bias, self.stride, 0, self.dilation, self.groups)
        return out


class BorderedConv1d(_Bordered, nn.Conv1d):
    """Conv1d that pads with one value for each channel."""


class BorderedConv2d(_Bordered, nn.Conv2d):
    """Conv2d that pads with one value for each channel."""


class BorderedConv3d(_Bordered, nn.Conv3d):
    """Conv3d that pads with one value for each channel."""


_BORDERED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: BorderedConv1d,
    nn.Conv2d: BorderedConv2d,
    nn.Conv3d: BorderedConv3d,
}


def bordered(conv: nn.Module) -> nn.Module:
    """A convolution like `conv`, with its tensors and hooks, and a border of zeros.

    Raises TypeError for any class but Conv1d, Conv2d and Conv3d themselves.
    """
    cls = _BORDERED.get(type(conv))
    if cls is None:
        raise TypeError(f"a {type(conv).__name__} cannot be given a border")
    twin: nn.Module = object.__new__(cls)
    twin.__dict__.update(conv.__dict__)
    weight = conv._parameters["weight"]
    assert weight is not None
    twin._buffers = dict(conv._buffers)
    channels = int(conv.in_channels)  # type: ignore[arg-type]
    twin._buffers["border"] = torch.zeros(channels, dtype=weight.dtype, device=weight.device)
    return twin
