"""Whose fault it is that a fold does not hold: a norm class that keeps its promise is not to be blamed for
what stands around it."""

from __future__ import annotations

import torch
from torch import nn

from fusecli.graph.lift import channel_affine
from fusecli.graph.materialise import in_float64, probe_input
from fusecli.proof.compare import TOLERANCE, compare
from fusecli.proof.run import float64_arithmetic


def keeps_promise(norm: nn.Module) -> bool:
    """Whether it computes what its statistics say and then calls its submodules, once each in their order."""
    try:
        twin = in_float64(norm).eval()
        x = probe_input(twin, torch.Generator().manual_seed(0x5EED))
        rest = nn.Sequential(*(child for child in twin._modules.values() if child is not None))
        with torch.no_grad(), float64_arithmetic():
            return compare(rest(channel_affine(twin)(x)), twin(x.clone())).error <= TOLERANCE
    except Exception:  # whatever somebody's forward may raise
        return False
