"""One tiny network for each rule, under the rule's name; its modules are named after what they are."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune


def chain(**modules: nn.Module) -> nn.Sequential:
    """The modules one after the other, under their names."""
    return nn.Sequential(OrderedDict(modules))


class BatchNormAct2d(nn.BatchNorm2d):
    """A batch norm with its activation inside, as several model libraries have it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def conv_bn() -> nn.Module:
    return chain(
        conv=nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), bn=nn.BatchNorm2d(8), act=nn.Hardswish()
    )


def conv_bn_relu() -> nn.Module:
    return chain(conv=nn.Conv1d(4, 8, 5, padding=4, dilation=2), bn=nn.BatchNorm1d(8), relu=nn.ReLU())


def conv_transpose_bn() -> nn.Module:
    up = nn.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False)
    return chain(conv=up, bn=nn.BatchNorm2d(8))


def conv_bn_qat() -> nn.Module:
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    return chain(conv=conv, bn=nn.BatchNorm2d(8), act=nn.Hardswish())


def conv_bn_relu_qat() -> nn.Module:
    return chain(conv=nn.Conv1d(4, 8, 5, padding=4, dilation=2), bn=nn.BatchNorm1d(8), relu=nn.ReLU())


def conv_relu() -> nn.Module:
    return chain(conv=nn.Conv2d(4, 8, 3, padding=1, groups=4), relu=nn.ReLU())


def linear_bn() -> nn.Module:
    return chain(linear=nn.Linear(6, 10), bn=nn.BatchNorm1d(10, affine=False))


def linear_bn_qat() -> nn.Module:
    return chain(linear=nn.Linear(6, 10), bn=nn.BatchNorm1d(10, momentum=0.3))


def linear_bn_relu() -> nn.Module:
    return chain(linear=nn.Linear(6, 10, bias=False), bn=nn.BatchNorm1d(10, eps=1e-3), relu=nn.ReLU())


def linear_relu() -> nn.Module:
    return chain(linear=nn.Linear(6, 10), relu=nn.ReLU())


def bn_relu() -> nn.Module:
    """A norm that no layer precedes, as at the start of a pre-activation block."""
    return chain(bn=nn.BatchNorm2d(6), relu=nn.ReLU(), conv=nn.Conv2d(6, 4, 1))


def bn_with_activation() -> nn.Module:
    return chain(conv=nn.Conv2d(3, 8, 3, padding=1, bias=False), bn=BatchNormAct2d(8))


class LayerScale(nn.Module):
    """One learned factor for each channel, along the last axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ImageScale(nn.Module):
    """The same for [n, c, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class RMSNorm(nn.Module):
    """As language models write it by hand: the gain is the last thing it does."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())


class Normalise(nn.Module):
    """The mean and the spread of a data set, taken out of the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Branched(nn.Module):
    """Branches of one tensor, added up."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(branches)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (branch(x) for branch in self.branches.values())
        for other in others:
            first = first + other
        return first


class TwoReaders(nn.Module):
    """A norm whose output goes into two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.small = nn.Conv2d(4, 3, 1, bias=False)
        self.large = nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return self.small(y).sigmoid() * self.large(y)


class Scaled(nn.Module):
    """Two residual branches that start small: behind a convolution, and behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(4, 4, 3, padding=1, bias=False), ImageScale(4)
        self.linear, self.layer_scale = nn.Linear(4, 4), LayerScale(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale(self.conv(x))
        y = x.flatten(2).transpose(1, 2)
        return y + self.layer_scale(self.linear(y))


class Attention(nn.Module):
    """A picture as tokens, one attention and one gated layer; each has a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = Normalise(3)
        self.patches = nn.Conv2d(3, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.rms = RMSNorm(6)
        self.gate, self.up = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(self.normalise(x)).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + (self.q(y) @ self.k(y).transpose(1, 2)).softmax(-1) @ self.v(y)
        y = self.rms(x)
        return self.gate(y).sigmoid() * self.up(y)


def bn_bn() -> nn.Module:
    """The convolution is separated from the norms by its activation: nothing else could take the second."""
    return chain(
        conv=nn.Conv2d(3, 4, 3), act=nn.ReLU(), bn=nn.BatchNorm2d(4), again=nn.BatchNorm2d(4), last=nn.ReLU()
    )


def scale_bn() -> nn.Module:
    return chain(normalise=Normalise(3), bn=nn.BatchNorm2d(3), act=nn.ReLU())


def bn_conv() -> nn.Module:
    return TwoReaders()


def bn_linear() -> nn.Module:
    return chain(
        conv=nn.Conv2d(3, 4, 3),
        act=nn.ReLU(),
        bn=nn.BatchNorm2d(4),
        drop=nn.Dropout2d(),
        flat=nn.Flatten(),
        linear=nn.Linear(16, 5),
    )


def layer_scale() -> nn.Module:
    return Scaled()


def gain_linear() -> nn.Module:
    return Attention()


def parallel_layers() -> nn.Module:
    """ACNet: the skeleton of a square kernel is trained on its own."""
    return Branched(
        square=nn.Conv2d(3, 4, 3, padding=1, bias=False),
        row=nn.Conv2d(3, 4, (1, 3), padding=(0, 1)),
        column=nn.Conv2d(3, 4, (3, 1), padding=(1, 0)),
    )


def parallel_norm() -> nn.Module:
    """A block of RepVGG, as it is trained."""
    return Branched(
        dense=chain(conv=nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), bn=nn.BatchNorm2d(4)),
        point=chain(conv=nn.Conv2d(4, 4, 1, groups=2, bias=False), bn=nn.BatchNorm2d(4)),
        identity=nn.BatchNorm2d(4),
    )


def pointwise_chain() -> nn.Module:
    return chain(
        expand=nn.Conv2d(3, 6, 1, bias=False),
        conv=nn.Conv2d(6, 4, 3, padding=1),
        act=nn.ReLU(),
        wide=nn.Conv2d(4, 8, 3),
        point=nn.Conv2d(8, 2, 1, bias=False),
        flat=nn.Flatten(),
        down=nn.Linear(8, 6),
        drop=nn.Dropout(),
        up=nn.Linear(6, 3),
    )


def bake() -> nn.Module:
    """Three layers whose weight is no tensor of its own; the last has nothing to be folded with."""
    return chain(
        conv=parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        bn=nn.BatchNorm2d(4),
        act=nn.ReLU(),
        sparse=prune.identity(nn.Conv2d(4, 4, 3), "weight"),
        act2=nn.ReLU(),
        bounded=parametrizations.spectral_norm(nn.Conv2d(4, 2, 1)),
    )


def lora() -> nn.Module:
    """The base model: its adapter is a file of its own, adapters/lora.safetensors."""
    return chain(q=nn.Linear(6, 8), act=nn.GELU(), v=nn.Linear(8, 4, bias=False))


def bn_conv_border() -> nn.Module:
    """The norm stands before a convolution that pads zeros."""
    return chain(act=nn.Sigmoid(), bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 4, 3, padding=1, bias=False))


def idle() -> nn.Module:
    return chain(
        conv=nn.Conv2d(3, 4, 3),
        act=nn.ReLU(),
        drop=nn.Dropout2d(0.3),
        pool=nn.AvgPool2d(1),
        last=nn.Conv2d(4, 2, 3),
    )


class Shared(nn.Module):
    """One convolution, applied again and again, each time with a norm of its own behind it (PolyNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for bn in self.bns:
            x = torch.relu(bn(self.conv(x)))
        return x


def shared_layer_bn() -> nn.Module:
    return Shared()
