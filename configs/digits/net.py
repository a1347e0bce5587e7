"""A small network for the handwritten digits of scikit-learn, with one of each layer worth folding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Stem(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Downsample(nn.Module):
    """A strided depthwise convolution: one filter per channel, 8x8 to 4x4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.depthwise(x)))


class Residual(nn.Module):
    """x + f(x): the batch norm's output is added to the block's input before the activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


class Upsample(nn.Module):
    """A transposed convolution: 4x4 back to 8x8."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, outputs, 2, stride=2)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Head(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, hidden)
        self.bn = nn.BatchNorm1d(hidden)
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.relu(self.bn(self.linear(x))))


class DigitsNet(nn.Module):
    """Images [n, 1, 8, 8] with pixels in 0..1 to scores [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem(32)
        self.down = Downsample(32)
        self.blocks = nn.Sequential(Residual(32), Residual(32))
        self.up = Upsample(32, 16)
        self.pool = nn.AvgPool2d(4)
        self.head = Head(16 * 2 * 2, 32)

    def forward(self, images: Tensor) -> Tensor:
        x = self.up(self.blocks(self.down(self.stem(images))))
        return self.head(self.pool(x).flatten(1))


def build() -> DigitsNet:
    return DigitsNet()
