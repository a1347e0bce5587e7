"""How long a call of a model takes, beside others on the same machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fusecli.sample import Sample


def latency(
    models: Mapping[str, Callable[..., Any]], sample: Sample, *, seconds: float = 1.0, rounds: int = 10
) -> dict[str, float]:
    """Seconds per call of each model on the CPU, measured in turns for about `seconds` each; warmed up.

    In turns, so that a machine that slows down slows all of them; at least one call in each round. The best
    of the rounds: what else runs can only add time (documentation of Python's timeit, `repeat`).
    """
    best = dict.fromkeys(models, math.inf)
    with torch.no_grad():
        calls = {}
        for name, model in models.items():
            _timed(model, sample, 2)
            calls[name] = max(1, round(seconds / rounds / max(_timed(model, sample, 1), 1e-9)))
        for _ in range(rounds):
            for name, model in models.items():
                best[name] = min(best[name], _timed(model, sample, calls[name]))
    return best


def _timed(model: Callable[..., Any], sample: Sample, calls: int) -> float:
    fresh = sample.copy()
    start = time.perf_counter()
    for _ in range(calls):
        model(*fresh.args, **fresh.kwargs)
    return (time.perf_counter() - start) / calls
