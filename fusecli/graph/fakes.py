"""Copies of a model without numbers, and what is left of them when a run is over.

Model code may keep a tensor outside of its modules: in a cache of functools, in a dict of its file. A fake
one there would meet the next run, which has numbers.
"""

from __future__ import annotations

import functools
import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fusecli.graph.materialise import duplicate
from fusecli.nn.duplicate import tensors_held


def fake_twin(structure: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy without numbers; tensors that share memory share it in the copy."""

    def fake(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return mode.from_tensor(tensor)
        twin: Tensor = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(twin, tensor.requires_grad)
        return twin

    held = (tensor for module in structure.modules() for _, tensor in tensors_held(module))
    return duplicate(structure, {id(tensor): fake(tensor) for tensor in held})


def forget(mode: FakeTensorMode) -> bool:
    """Takes the fake tensors of `mode` out of caches; whether none is left anywhere.

    A name that holds one (of a file, a class, an object) holds None afterwards, as most caches begin; entries
    of dicts and lists are gone. Call it when nothing of the run is needed any more.
    """
    # Not isinstance: some objects answer for their class with code of their own.
    caches = [found for found in gc.get_objects() if type(found) is functools._lru_cache_wrapper]
    for cache in caches:
        cache.cache_clear()
    left = _alive(mode)
    ours = {id(tensor) for tensor in left}
    for holder in gc.get_referrers(*left) if left else ():
        if type(holder) is list and holder is not left:
            holder[:] = [item for item in holder if id(item) not in ours]
        elif type(holder) is dict:
            _empty(holder, [key for key, value in holder.items() if id(value) in ours])
        elif hasattr(holder, "__dict__") and type(holder).__module__ != "builtins":
            _empty(vars(holder), [key for key, value in vars(holder).items() if id(value) in ours])
    del left
    return not _alive(mode)


def _empty(names: dict[str, Any], keys: list[str]) -> None:
    holders = gc.get_referrers(names)
    owner = next((o for o in holders if isinstance(o, type) or getattr(o, "__dict__", None) is names), None)
    for key in keys:
        if isinstance(owner, type):
            setattr(owner, key, None)
        elif owner is not None or "__name__" in names:
            names[key] = None
        else:
            del names[key]


def _alive(mode: FakeTensorMode) -> list[Any]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is FakeTensor and found.fake_mode is mode]
