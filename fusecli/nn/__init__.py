"""The fused module classes, with the child layout and the state-dict keys of torch.ao's intrinsic modules.

torch.ao.quantization is deprecated and due for removal, so nothing here imports it.
"""

from __future__ import annotations

from fusecli.nn.fused_module import FusedModule
from fusecli.nn.relu import (
    BNReLU1d,
    BNReLU2d,
    BNReLU3d,
    ConvReLU1d,
    ConvReLU2d,
    ConvReLU3d,
    LinearReLU,
    container_class,
    container_for,
)
from fusecli.nn.zero import Zero

__all__ = [
    "BNReLU1d",
    "BNReLU2d",
    "BNReLU3d",
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "FusedModule",
    "LinearReLU",
    "Zero",
    "container_class",
    "container_for",
]
