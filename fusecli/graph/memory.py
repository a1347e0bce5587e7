"""Which tensors are the same memory: told by storage and layout, not by Python identity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

Layout = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass
class Memory:
    """One storage: the value of each view of it since the last write, and of views that are out of date.

    writes  how often an op has written to it
    """

    watch: Any
    latest: int
    current: dict[Layout, int] = field(default_factory=dict)
    stale: dict[Layout, int] = field(default_factory=dict)
    writes: int = 0


def key_of(tensor: Tensor) -> tuple[Any, Any]:
    """What tells a storage from all others, also when its memory is used again, and a watch on its life."""
    try:
        with torch._C.DisableTorchFunction():  # a look at the storage is an escape, but not this one
            watch = StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
        return id(tensor), tensor
    return watch.cdata, watch


def same_memory(model: nn.Module) -> tuple[frozenset[str], ...]:
    """Names of parameters and buffers that share memory, as Python objects or as views of one storage."""
    spans: dict[Any, list[tuple[int, int, str]]] = {}
    for name, tensor in chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        if is_lazy(tensor):
            continue
        offset, shape, strides, _ = layout_of(tensor)
        extent = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=False))
        if tensor.numel():
            spans.setdefault(key_of(tensor)[0], []).append((offset, offset + extent, name))
    return tuple(names for found in spans.values() for names in _overlapping(sorted(found)))


def _overlapping(spans: list[tuple[int, int, str]]) -> Iterator[frozenset[str]]:
    names: list[str] = []
    end = -1
    for first, last, name in spans:
        if first > end:
            if len(names) > 1:
                yield frozenset(names)
            names = []
        names.append(name)
        end = max(end, last)
    if len(names) > 1:
        yield frozenset(names)


def expired(watch: Any) -> bool:
    return isinstance(watch, StorageWeakRef) and watch.expired()


def layout_of(tensor: Tensor) -> Layout:
    try:
        return int(tensor.storage_offset()), shape_of(tensor), tensor.stride(), tensor.dtype
    except (RuntimeError, NotImplementedError):  # sparse tensors have no strides
        return 0, shape_of(tensor), (), tensor.dtype


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The sizes of a tensor; of a nested one, which has none of its own, no sizes."""
    return () if tensor.is_nested else tuple(tensor.shape)
