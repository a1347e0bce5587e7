"""The arguments of one forward call, and the conditions a call is repeated under: fresh tensors, one seed."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Mapping
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

    def mapped(self, leaf: Callable[[Tensor], Tensor]) -> Sample:
        """The same arguments with `leaf(tensor)` for each tensor."""
        return Sample(mapped(self.args, leaf), mapped(dict(self.kwargs), leaf))


def mapped(value: Any, leaf: Callable[[Tensor], Any]) -> Any:
    """Nested tuples, lists, dicts and dataclasses made anew, with `leaf(tensor)` for each tensor in them."""
    if isinstance(value, Tensor):
        return leaf(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, leaf) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, leaf) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, leaf) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fresh = copy.copy(value)
        for name in (entry.name for entry in dataclasses.fields(value)):
            object.__setattr__(fresh, name, mapped(getattr(value, name), leaf))
        return fresh
    return value


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A copy of `value` and its tensors, the floating ones in `dtype` (None: kept)."""

    def fresh(tensor: Tensor) -> Tensor:
        clone = tensor.detach().clone()
        return clone.to(dtype) if dtype and tensor.is_floating_point() else clone

    return mapped(value, fresh)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside `value`, in order."""
    found: list[Tensor] = []
    mapped(value, found.append)
    return found


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
