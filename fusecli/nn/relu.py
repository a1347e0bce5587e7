"""A layer and the ReLU behind it, in one container.

The layer is child "0" and the ReLU child "1": the weight of a conv at `x` moves to `x.0.weight`, as
it does in torch.ao.nn.intrinsic, so that state dicts are interchangeable.
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


_CONTAINERS = (ConvReLU1d, ConvReLU2d, ConvReLU3d, LinearReLU, BNReLU1d, BNReLU2d, BNReLU3d)


def container_for(first: nn.Module) -> type[FusedModule] | None:
    """The container that takes `first` and an nn.ReLU, or None: transposed convs, for one, have none."""
    return next((kind for kind in _CONTAINERS if isinstance(first, kind.members[0])), None)


def container_class(name: str) -> type[FusedModule]:
    """The container of that name; raises KeyError for any other, since names come from files."""
    return {kind.__name__: kind for kind in _CONTAINERS}[name]
