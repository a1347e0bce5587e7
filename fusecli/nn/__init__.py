"""The fused module classes, with the child layout and the state-dict keys of torch.ao's intrinsic modules,
and layers whose weight is computed from other tensors.

torch.ao.quantization is deprecated and due for removal, so nothing here imports it.
"""

from __future__ import annotations

from fusecli.nn.adapted import Adapted, adapt
from fusecli.nn.bordered import BorderedConv1d, BorderedConv2d, BorderedConv3d, bordered
from fusecli.nn.computed import computed_tensor, computes, is_source, make_plain
from fusecli.nn.containers import (
    BNReLU1d,
    BNReLU2d,
    BNReLU3d,
    ConvBn1d,
    ConvBn2d,
    ConvBn3d,
    ConvBnReLU1d,
    ConvBnReLU2d,
    ConvBnReLU3d,
    ConvReLU1d,
    ConvReLU2d,
    ConvReLU3d,
    LinearBn1d,
    LinearReLU,
    container_class,
    container_for,
)
from fusecli.nn.fused_module import FusedModule
from fusecli.nn.zero import Zero

__all__ = [
    "Adapted",
    "BNReLU1d",
    "BNReLU2d",
    "BNReLU3d",
    "BorderedConv1d",
    "BorderedConv2d",
    "BorderedConv3d",
    "ConvBn1d",
    "ConvBn2d",
    "ConvBn3d",
    "ConvBnReLU1d",
    "ConvBnReLU2d",
    "ConvBnReLU3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "FusedModule",
    "LinearBn1d",
    "LinearReLU",
    "Zero",
    "adapt",
    "bordered",
    "computed_tensor",
    "computes",
    "container_class",
    "container_for",
    "is_source",
    "make_plain",
]
