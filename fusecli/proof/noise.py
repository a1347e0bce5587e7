"""How much error is a matter of rounding: what float64 is granted, and what the stored dtype is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.graph.materialise import duplicate
from fusecli.proof.compare import MOST, TOLERANCE, floating_error
from fusecli.proof.run import run
from fusecli.sample import Sample

MAX_DRIFT = 10.0  # times the original's own error
# A network that amplifies rounding does so in float64 too. Measured where a bias of 1e4 to 1e6 cancels a
# running mean: float64 loses at most 18 times what the noise floor predicts for it.
_MARGIN = 64.0
_DRAWS = 8


def tolerance(noise: float | None, dtype: torch.dtype) -> float:
    """The line for a float64 error, where the error of the original in `dtype` is `noise`."""
    predicted = (noise or 0.0) * torch.finfo(torch.float64).eps / torch.finfo(dtype).eps
    return min(MOST, max(TOLERANCE, _MARGIN * predicted))


def drifts(drift: float | None, noise: float | None, dtype: torch.dtype) -> bool:
    """Whether the fused model's error is beyond 10 times the original's own. An original that happens to be
    exact is granted the rounding of its dtype."""
    if drift is None or noise is None:
        return False
    if not math.isfinite(drift):  # where the original is finite, however far its neighbours are from it
        return math.isfinite(noise)
    return not drift <= max(TOLERANCE, MAX_DRIFT * max(noise, torch.finfo(dtype).eps))


def noise_of_neighbours(original: nn.Module, sample: Sample, reference: Any, seed: int) -> float:
    """The largest error against `reference` of `original` with weights moved by one unit in the last place.

    One run may be right by luck, above all where the output is one number: that is no floor to be held to.
    """
    errors = [0.0]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_DRAWS):
        moved = duplicate(original)
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                sign = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter.device) * 2 - 1
                parameter.data.mul_(1 + sign * torch.finfo(parameter.dtype).eps)
        errors.append(floating_error(reference, run(moved, sample, seed=seed)) or 0.0)
    return max(error for error in errors if math.isfinite(error))


def narrowest(tensors: Iterable[Tensor]) -> torch.dtype:
    """The narrowest floating dtype among them: it sets the noise."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} or {torch.float32}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
