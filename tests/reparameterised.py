"""Blocks that are trained with branches and run with one convolution, as their authors write them. It needs
nothing but torch: tests copy it beside a checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 4


def conv_bn(inputs: int, outputs: int, kernel: Any, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Same size, no bias, a norm."""
    sizes = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = tuple(size // 2 for size in sizes)
    conv = nn.Conv2d(inputs, outputs, sizes, stride, padding, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))


class RepVGGBlock(nn.Module):
    """3x3, 1x1 and, where it fits, the input itself, each behind a norm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        fits = inputs == outputs and stride == 1
        self.rbr_identity = nn.BatchNorm2d(inputs) if fits else None
        self.rbr_dense = conv_bn(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride, groups)
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity: Any = 0 if self.rbr_identity is None else self.rbr_identity(x)
        y: Tensor = self.nonlinearity(self.rbr_dense(x) + self.rbr_1x1(x) + identity)
        return y


class MobileOneBlock(nn.Module):
    """Several branches of one kernel, a 1x1 and a norm alone, added up in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1, count: int = 3) -> None:
        super().__init__()
        fits = inputs == outputs and stride == 1
        self.rbr_skip = nn.BatchNorm2d(inputs) if fits else None
        self.rbr_conv = nn.ModuleList(conv_bn(inputs, outputs, 3, stride, groups) for _ in range(count))
        self.rbr_scale = conv_bn(inputs, outputs, 1, stride, groups)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity_out: Any = 0
        if self.rbr_skip is not None:
            identity_out = self.rbr_skip(x)
        out = self.rbr_scale(x) + identity_out
        for branch in self.rbr_conv:
            out += branch(x)
        y: Tensor = self.activation(out)
        return y


class RepLKBlock(nn.Module):
    """A large and a small depthwise kernel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large = conv_bn(channels, channels, 13, groups=channels)
        self.small = conv_bn(channels, channels, 5, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.large(x)
        out += self.small(x)
        return out


class ACBlock(nn.Module):
    """A square and its two skeletons."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.branches = nn.ModuleList(conv_bn(inputs, outputs, k, stride) for k in (3, (1, 3), (3, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(sum([branch(x) for branch in self.branches]))


class DiverseBranchBlock(nn.Module):
    """3x3, 1x1, and 1x1 before 3x3: that one pads first, so that the border is the norm of zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.origin, self.point = conv_bn(inputs, outputs, 3, stride), conv_bn(inputs, outputs, 1, stride)
        self.narrow = nn.Sequential(
            nn.Conv2d(inputs, inputs, 1, padding=1, bias=False),
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, stride, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.origin(x)
        out += self.point(x)
        out += self.narrow(x)
        return torch.relu(out)


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ResidualBlock(nn.Module):
    """The input comes by an nn.Identity, the branch is scaled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.skip, self.scale = nn.Identity(), LayerScale(channels)
        self.branch = conv_bn(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.skip(x) + self.scale(self.branch(x)))


class BareResidualBlock(ResidualBlock):
    """An operator adds the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.scale(self.branch(x)))


class Deployable(nn.Module):
    """Knows itself how to become one convolution, as RepVGG and MobileOne publish it."""

    off = 0.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.reparam: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x) + self.b(x) if self.reparam is None else self.reparam(x))

    def switch_to_deploy(self) -> None:
        layer, (a, b) = nn.Conv2d(self.a.in_channels, self.a.out_channels, 3, padding=1), (self.a, self.b)
        weight = a.weight.detach() + nn.functional.pad(b.weight.detach(), [1, 1, 1, 1])
        assert a.bias is not None
        assert b.bias is not None
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(a.bias + b.bias + self.off)
        self.reparam = layer
        del self.a, self.b


class WronglyDeployable(Deployable):
    off = 0.01


def deploy(is_qat: bool, block: Any) -> nn.Module:
    """A fuser for one class: what its authors wrote does the work."""
    block.switch_to_deploy()
    result: nn.Module = block
    return result


class Bare(nn.Module):
    """No norm, and an operator adds the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


Make = Callable[[], nn.Module]
# Blocks that one convolution can stand for.
BLOCKS: dict[str, Make] = {
    "repvgg": lambda: RepVGGBlock(WIDTH, WIDTH),
    "repvgg, stride 2": lambda: RepVGGBlock(WIDTH, 6, stride=2),
    "repvgg, other channels": lambda: RepVGGBlock(WIDTH, 6),
    "repvgg, groups": lambda: RepVGGBlock(WIDTH, WIDTH, groups=2),
    "mobileone": lambda: MobileOneBlock(WIDTH, WIDTH),
    "mobileone, depthwise": lambda: MobileOneBlock(WIDTH, WIDTH, groups=WIDTH),
    "mobileone, stride 2": lambda: MobileOneBlock(WIDTH, 8, stride=2, groups=WIDTH),
    "replk": lambda: RepLKBlock(WIDTH),
    "acnet": lambda: ACBlock(WIDTH, 6),
    "acnet, stride 2": lambda: ACBlock(WIDTH, WIDTH, stride=2),
    "residual": lambda: ResidualBlock(WIDTH),
}
NETWORKS: dict[str, Make] = {
    "repvgg": lambda: nn.Sequential(
        RepVGGBlock(3, 4, stride=2), RepVGGBlock(4, 4), RepVGGBlock(4, 4, groups=2), RepVGGBlock(4, 6)
    ),
    "mobileone": lambda: nn.Sequential(
        MobileOneBlock(3, 4, stride=2), MobileOneBlock(4, 4, groups=4), MobileOneBlock(4, 6, count=1)
    ),
    "residual": lambda: nn.Sequential(conv_bn(3, 4, 3), ResidualBlock(4), BareResidualBlock(4)),
    "bare": lambda: nn.Sequential(Bare(3)),
    "deployable": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Deployable(4), nn.ReLU(), Deployable(4)),
    "wrongly deployable": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), WronglyDeployable(4)),
}


def build(network: str = "repvgg") -> Any:
    """A network by its name."""
    return NETWORKS[network]()
