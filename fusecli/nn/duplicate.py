"""Copies of whole models: all of it is copied, or the model is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from types import FunctionType
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
        twin: nn.Module = _deep_copy(model, memo)
    except Exception as error:  # whatever somebody's class may raise; a lock or an open file has no copy
        what = f"{_uncopied(model)} cannot be copied: {type(error).__name__}: {error}"
        raise RefusedError(Problem(what, "model", _COPYABLE)) from error
    if shared := _shared(model, twin, {id(value) for value in (instead or {}).values()}):
        raise RefusedError(Problem(f"a copy of the model has {shared} in common with it", "model", _APART))
    return twin


def _deep_copy(value: Any, memo: dict[int, Any]) -> Any:
    """copy.deepcopy, without asking modules and plain containers how they are pickled: that is most of the
    time that a model of many small layers takes."""
    kind: Any = type(value)
    if kind in _ATOMS:
        return value
    if (known := memo.get(id(value))) is not None:
        return known
    if kind in (list, dict, OrderedDict) and not value:
        memo[id(value)] = empty = kind()
        return empty
    if kind is list:
        items: list[Any] = []
        memo[id(value)] = items
        items.extend(_deep_copy(item, memo) for item in value)
        return items
    if kind is dict or kind is OrderedDict:
        memo[id(value)] = found = kind()
        for key, item in value.items():
            found[_deep_copy(key, memo)] = _deep_copy(item, memo)
        return found
    if isinstance(value, nn.Module) and _has_no_say(kind):
        memo[id(value)] = module = object.__new__(kind)
        entries = module.__dict__
        for name, item in vars(value).items():
            if name != _COMPILED:
                entries[name] = item if type(item) in _ATOMS else _deep_copy(item, memo)
        return module
    return copy.deepcopy(value, memo)


_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, range, type, FunctionType))
_HOW = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__new__")
_COMPILED = "_compiled_call_impl"  # torch.compile's: torch copies no module with it


@cache
def _has_no_say(kind: Any) -> bool:
    """Whether modules of this class are copied attribute by attribute, all of which torch knows how to do."""
    usual = all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _HOW)
    # torch's own give old checkpoints what they have not got.
    restored: Any = getattr(kind, "__setstate__", None)
    known = getattr(restored, "__module__", "").startswith("torch.nn.modules.")
    return usual and known and not any("__slots__" in vars(each) for each in kind.__mro__[:-1])


def tensors_held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the attributes of a module, its parameters and buffers among them, and in lists, tuples
    and dicts there, each with the attribute's name."""
    for place in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in place.items() if tensor is not None)
    for name, held in vars(module).items():
        if isinstance(held, Tensor):
            yield name, held
        elif isinstance(held, dict | list | tuple) and held and name not in _PLACES:
            yield from ((name, tensor) for tensor in _tensors_inside(held))


_PLACES = ("_parameters", "_buffers", "_modules")


def _tensors_inside(container: Any) -> Iterator[Tensor]:
    waiting, seen = [container], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


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
