"""Layers in a row in one container, as torch.ao.nn.intrinsic has them.

The first is child "0", the next "1": the weight of a conv at `x` moves to `x.0.weight`, as it does there,
so that state dicts are interchangeable.
"""

from __future__ import annotations

from torch import nn

from fusecli.nn.fused_module import FusedModule


class ConvReLU1d(FusedModule):
    """relu(conv(x)), x [n, c, l]."""

    members = (nn.Conv1d, nn.ReLU)


class ConvReLU2d(FusedModule):
    """relu(conv(x)), x [n, c, h, w]."""

    members = (nn.Conv2d, nn.ReLU)


class ConvReLU3d(FusedModule):
    """relu(conv(x)), x [n, c, d, h, w]."""

    members = (nn.Conv3d, nn.ReLU)


class LinearReLU(FusedModule):
    """relu(linear(x)), x [..., c]."""

    members = (nn.Linear, nn.ReLU)


class BNReLU1d(FusedModule):
    """relu(bn(x)), x [n, c] or [n, c, l]; torch.ao has no such class, its 2d and 3d siblings it has."""

    members = (nn.BatchNorm1d, nn.ReLU)


class BNReLU2d(FusedModule):
    """relu(bn(x)), x [n, c, h, w]."""

    members = (nn.BatchNorm2d, nn.ReLU)


class BNReLU3d(FusedModule):
    """relu(bn(x)), x [n, c, d, h, w]."""

    members = (nn.BatchNorm3d, nn.ReLU)


# For training: a norm that still learns is not folded, it is kept beside its layer.


class ConvBn1d(FusedModule):
    """bn(conv(x)), x [n, c, l]."""

    members = (nn.Conv1d, nn.BatchNorm1d)


class ConvBn2d(FusedModule):
    """bn(conv(x)), x [n, c, h, w]."""

    members = (nn.Conv2d, nn.BatchNorm2d)


class ConvBn3d(FusedModule):
    """bn(conv(x)), x [n, c, d, h, w]."""

    members = (nn.Conv3d, nn.BatchNorm3d)


class ConvBnReLU1d(FusedModule):
    """relu(bn(conv(x))), x [n, c, l]."""

    members = (nn.Conv1d, nn.BatchNorm1d, nn.ReLU)


class ConvBnReLU2d(FusedModule):
    """relu(bn(conv(x))), x [n, c, h, w]."""

    members = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


class ConvBnReLU3d(FusedModule):
    """relu(bn(conv(x))), x [n, c, d, h, w]."""

    members = (nn.Conv3d, nn.BatchNorm3d, nn.ReLU)


class LinearBn1d(FusedModule):
    """bn(linear(x)), x [n, c]."""

    members = (nn.Linear, nn.BatchNorm1d)


_CONTAINERS = (
    *(ConvReLU1d, ConvReLU2d, ConvReLU3d, LinearReLU, BNReLU1d, BNReLU2d, BNReLU3d),
    *(ConvBn1d, ConvBn2d, ConvBn3d, ConvBnReLU1d, ConvBnReLU2d, ConvBnReLU3d, LinearBn1d),
)


def container_for(*modules: nn.Module) -> type[FusedModule] | None:
    """The container that takes these modules, or None: transposed convs, for one, have none."""
    fitting = (kind for kind in _CONTAINERS if len(kind.members) == len(modules))
    return next((kind for kind in fitting if all(map(isinstance, modules, kind.members))), None)


def container_class(name: str) -> type[FusedModule]:
    """The container of that name; raises KeyError for any other, since names come from files."""
    return {kind.__name__: kind for kind in _CONTAINERS}[name]
