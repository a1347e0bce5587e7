"""One tensor of a checkpoint, not read until somebody asks, and which names are the same memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fusecli.checkpoint.trouble import unreadable

_PLAIN_ADVICE = "convert it to a plain dense tensor and save the state dict again"


@dataclass(frozen=True)
class StoredTensor:
    """What is known of a tensor before it is read, and the way to read it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    forget: Callable[[], None] = lambda: None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """The tensor on the CPU: zero-copy from a private memory map where the format allows it.

        It must not be written to. A write would never reach the file (the map is copy-on-write), but
        tied names and later calls of `load` share this memory.
        """
        return self.read()

    def release(self) -> None:
        """Gives back the memory that reading a mapped tensor took; it may be loaded again."""
        self.forget()


def store(name: str, tensor: torch.Tensor, path: Path) -> StoredTensor:
    """A tensor that torch.load has mapped or read already."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        raise unreadable(path, f"tensor '{name}' is {_kind(tensor)}, not a plain dense tensor", _PLAIN_ADVICE)
    plain = tensor.detach()
    return StoredTensor(name, tensor.dtype, tuple(tensor.shape), lambda: plain)


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    if tensor.is_meta:
        return "without data (meta)"
    return "nested" if tensor.is_nested else f"sparse ({tensor.layout})"


def find_ties(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    """Names that are the very same memory, as tied weights are: same storage, offset, shape and stride."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():  # empty tensors own no memory that could be shared
            groups.setdefault(memory_of(tensor), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def memory_of(tensor: torch.Tensor) -> tuple[object, ...]:
    """What makes two tensors one: where the memory is, and how it is looked at."""
    where = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*where, tuple(tensor.shape), tensor.stride(), tensor.dtype)
