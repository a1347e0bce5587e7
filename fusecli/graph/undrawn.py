"""Building models without numbers: nothing is drawn for parameters that hold none.

On the meta device torch fills tensors with random numbers in Python, and imports its compiler for that: a
second and a half of CPU, which a language model would spend on its embedding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

_METHODS = (
    "normal_",
    "uniform_",
    "bernoulli_",
    "random_",
    "exponential_",
    "log_normal_",
    "cauchy_",
    "geometric_",
)
_DRAWS = frozenset(getattr(Tensor, name) for name in _METHODS) | frozenset(
    getattr(init, name) for name in ("normal_", "uniform_", "trunc_normal_")
)


class Undrawn(TorchFunctionMode):
    """Inside, a tensor of the meta device that is to be filled with random numbers stays as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        filled = args[0] if args else (kwargs or {}).get("tensor")
        if func in _DRAWS and isinstance(filled, Tensor) and filled.is_meta:
            return filled
        return func(*args, **(kwargs or {}))
