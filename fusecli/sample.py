"""The arguments of one forward call, and the conditions a call is repeated under: fresh tensors, one seed."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """The arguments of one forward call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Any) -> Sample:
        """A tensor is the only argument, a tuple or list are the arguments in order, a dict is by keyword."""
        if isinstance(inputs, Sample):
            return inputs
        if isinstance(inputs, Mapping):
            return cls(kwargs=dict(inputs))
        return cls(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,))

    def copy(self, dtype: torch.dtype | None = None) -> Sample:
        """Fresh tensors, the floating ones in `dtype`: a forward may write to its input."""
        return Sample(cast(self.args, dtype), cast(dict(self.kwargs), dtype))


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A copy of nested tuples, lists, dicts and dataclasses, floating tensors in `dtype` (None: kept)."""
    if isinstance(value, Tensor):
        return (
            value.detach().clone().to(dtype)
            if dtype and value.is_floating_point()
            else value.detach().clone()
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(item, dtype) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fresh = copy.copy(value)
        for name in (entry.name for entry in dataclasses.fields(value)):
            object.__setattr__(fresh, name, cast(getattr(value, name), dtype))
        return fresh
    return value


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the random numbers of torch on the CPU, of Python and of numpy start from `seed`."""
    numpy = sys.modules.get("numpy")
    python, legacy = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(legacy)
