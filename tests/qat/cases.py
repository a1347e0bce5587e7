"""Every layer that can be prepared, beside what it was: small, in float64, with random statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fusecli.nn as fused_nn
from fusecli.nn import FusedModule

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
# Channels 4 -> 6; what a convolution can be told.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "groups": {"groups": 2, "stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "replicate": {"padding": "same", "padding_mode": "replicate"},
}


@torch.no_grad()
def randomized(module: nn.Module, *, silent: bool = True) -> nn.Module:
    """Random statistics, some gammas negative and, unless not `silent`, one exactly 0."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                tensor.copy_(torch.randn_like(tensor) + 0.1)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.3, 3)  # type: ignore[union-attr]
            norm.weight[0] = -0.7
            if silent:
                norm.weight[1] = 0
    return module


def conv_parts(rank: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    return CONVS[rank](4, 6, 3, **options), NORMS[rank](6)


def container(name: str, **options: Any) -> FusedModule:
    """The container of fusecli.nn with that name."""
    layer: nn.Module
    if name.startswith("Linear"):
        layer, bn = nn.Linear(4, 6, **options), nn.BatchNorm1d(6)
    else:
        layer, bn = conv_parts(int(name[-2]), **options)
    parts = [layer, *([bn] if "Bn" in name else []), *([nn.ReLU()] if "ReLU" in name else [])]
    made = getattr(fused_nn, name)(*parts)
    assert isinstance(made, FusedModule)
    return made


def batch(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Five samples for the layer of that name: even one channel of LinearBn1d has statistics."""
    rank = 0 if name.startswith("Linear") else int(name[-2])
    return torch.randn(5, 4, *[7] * rank, dtype=dtype)


WITH_NORM = [
    *(f"Conv{kind}{rank}d" for kind, rank in itertools.product(("Bn", "BnReLU"), (1, 2, 3))),
    "LinearBn1d",
]
WITH_RELU = ["ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "LinearReLU"]
PLAIN: dict[str, Callable[..., nn.Module]] = {
    "Conv1d": lambda **options: nn.Conv1d(4, 6, 3, **options),
    "Conv2d": lambda **options: nn.Conv2d(4, 6, 3, **options),
    "Conv3d": lambda **options: nn.Conv3d(4, 6, 3, **options),
    "Linear": lambda **options: nn.Linear(4, 6, **options),
}
NAMES = [*WITH_NORM, *WITH_RELU, *PLAIN]


def build(name: str, **options: Any) -> nn.Module:
    return PLAIN[name](**options) if name in PLAIN else container(name, **options)


CASES = [
    (name, option)
    for name, option in itertools.product(NAMES, OPTIONS)
    if not name.startswith("Linear") or option in ("plain", "no bias")
]
IDS = [f"{name}-{option}" for name, option in CASES]
