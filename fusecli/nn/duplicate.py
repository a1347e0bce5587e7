"""Copies of whole models: all of it is copied, or the model is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fusecli.errors import Problem, RefusedError

_WHOLE = "the model"
_COPYABLE = "let its class say how it is copied (__deepcopy__, or __getstate__ without what no copy needs)"
_APART = "let __deepcopy__ of its class make a copy, or take it out of the model while it is fused"


def duplicate(model: nn.Module, instead: Mapping[int, object] | None = None) -> nn.Module:
    """A deep copy of `model` that shares nothing with it; `instead` says, by id, what it holds where the
    original holds something else.

    torch copies no tensor that autograd has computed, such as the weight that weight_norm keeps beside its
    parameters, or an activation that a forward has left behind, and no compressed sparse or nested one: of
    those the copy gets the values, and where they are a view of a parameter a view of the copy's.
    Raises RefusedError where the classes of the model have it otherwise: what is done to the copy would be
    done to the original.
    """
    memo: dict[int, Any] = dict(instead or {})
    # The empty registries of hooks, a dozen of them in every module, are most of the work.
    registries = (value for module in model.modules() for value in vars(module).values())
    memo.update(
        (id(value), OrderedDict()) for value in registries if type(value) is OrderedDict and not value
    )
    own = {_memory(parameter) for parameter in model.parameters() if not is_lazy(parameter)}
    for value in (tensor for module in model.modules() for _, tensor in tensors_held(module)):
        if id(value) in memo or _copied_by_torch(value):
            continue
        is_parameter = isinstance(value, nn.Parameter)
        if not is_parameter and _memory(value) in own:
            memo[id(value)] = copy.deepcopy(value.detach(), memo)  # which copies each memory once
        else:
            fresh = value.detach().clone()
            memo[id(value)] = nn.Parameter(fresh, value.requires_grad) if is_parameter else fresh
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # whatever somebody's class may raise; a lock or an open file has no copy
        what = f"{_uncopied(model)} cannot be copied: {type(error).__name__}: {error}"
        raise RefusedError(Problem(what, "model", _COPYABLE)) from error
    if shared := _shared(model, twin, {id(value) for value in (instead or {}).values()}):
        raise RefusedError(Problem(f"a copy of the model has {shared} in common with it", "model", _APART))
    return twin


def tensors_held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the attributes of a module, its parameters and buffers among them, and in lists, tuples
    and dicts there, each with the attribute's name."""
    held = {**vars(module), **module._parameters, **module._buffers}
    waiting, seen = list(held.items()), set[int]()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += ((name, each) for each in (value.values() if isinstance(value, dict) else value))


def _copied_by_torch(tensor: Tensor) -> bool:
    plain = tensor.layout in (torch.strided, torch.sparse_coo) and not tensor.is_nested
    return is_lazy(tensor) or (tensor.is_leaf and plain)


def _shared(model: nn.Module, twin: nn.Module, given: set[int]) -> str:
    """The first module, or else tensor, that the two have in common; `given` they may have."""
    theirs, ours = [*model.named_modules()], [*twin.modules()]
    known = set(map(id, ours))
    for name, module in theirs:
        if id(module) in known:
            return name or _WHOLE
    old, new = _tensors(model, given), _tensors(twin, given)
    memory = {_memory(tensor) for _, tensor in new}
    return next((name for name, tensor in old if _memory(tensor) in memory), "")


def _tensors(model: nn.Module, given: set[int]) -> list[tuple[str, Tensor]]:
    named = chain(model.named_parameters(), model.named_buffers())
    return [(n, t) for n, t in named if id(t) not in given and not is_lazy(t) and t.numel()]


def _memory(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have none
        return id(tensor)


def _uncopied(model: nn.Module) -> str:
    """The innermost module that is not copied."""
    for name, child in model.named_children():
        try:
            copy.deepcopy(child)
        except Exception:  # as above
            inner = _uncopied(child)
            return name if inner == _WHOLE else f"{name}.{inner}"
    return _WHOLE
