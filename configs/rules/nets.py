"""One tiny network for each rule, under the rule's name; its modules are named after what they are."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


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


def conv_relu() -> nn.Module:
    return chain(conv=nn.Conv2d(4, 8, 3, padding=1, groups=4), relu=nn.ReLU())


def linear_bn() -> nn.Module:
    return chain(linear=nn.Linear(6, 10), bn=nn.BatchNorm1d(10, affine=False))


def linear_bn_relu() -> nn.Module:
    return chain(linear=nn.Linear(6, 10, bias=False), bn=nn.BatchNorm1d(10, eps=1e-3), relu=nn.ReLU())


def linear_relu() -> nn.Module:
    return chain(linear=nn.Linear(6, 10), relu=nn.ReLU())


def bn_relu() -> nn.Module:
    """A norm that no layer precedes, as at the start of a pre-activation block."""
    return chain(bn=nn.BatchNorm2d(6), relu=nn.ReLU(), conv=nn.Conv2d(6, 4, 1))


def bn_with_activation() -> nn.Module:
    return chain(conv=nn.Conv2d(3, 8, 3, padding=1, bias=False), bn=BatchNormAct2d(8))
