"""The int8 hazard of a fold: how much the ranges of a layer's output channels differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusecli.algebra import unpack
from fusecli.algebra.blocks import BLOCK
from fusecli.graph.kinds import LAYER_KINDS, kind_of
from fusecli.rewrite import Rewrite

Ranges = tuple[float | None, float | None]


def weight_range(layer: nn.Module, rewrite: Rewrite, path: str) -> Ranges:
    """Largest over smallest per-channel |weight|, before and after: what per-tensor int8 would suffer from.

    None where nothing was computed, or every channel is dead.
    """
    old, new = layer._parameters.get("weight"), rewrite.tensors.get(f"{path}.weight")
    if old is None or new is None or new.ndim < 2:
        return None, None
    groups, transposed = int(getattr(layer, "groups", 1)), kind_of(layer) == "conv_transpose"
    return _range(unpack(old.detach(), groups, transposed)), _range(unpack(new, groups, transposed))


def channel_range(layer: nn.Module) -> float | None:
    """The same of a layer as it is; None for what is no layer."""
    weight, kind = layer._parameters.get("weight"), kind_of(layer)
    if weight is None or kind not in LAYER_KINDS:
        return None
    return _range(unpack(weight.detach(), int(getattr(layer, "groups", 1)), kind == "conv_transpose"))


def _range(weight: Tensor) -> float | None:
    # Some rows at a time, which stay in the cache for both passes, and no copy.
    rows = weight.flatten(0, 1).flatten(1)
    blocks = rows.split(max(1, BLOCK // max(1, rows.shape[1])))
    largest = torch.cat([torch.maximum(block.amax(1), -block.amin(1)) for block in blocks]).double()
    alive = largest[largest > 0]
    return float(alive.max() / alive.min()) if alive.numel() else None
