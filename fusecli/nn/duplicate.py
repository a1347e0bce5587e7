"""Copies of whole models: all of it is copied, or the model is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
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
    those the copy gets the values.
    Raises RefusedError where the classes of the model have it otherwise: what is done to the copy would be
    done to the original.
    """
    memo: dict[int, object] = dict(instead or {})
    for module in model.modules():
        for value in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            if isinstance(value, Tensor) and id(value) not in memo and not _copied_by_torch(value):
                fresh = value.detach().clone()
                is_parameter = isinstance(value, nn.Parameter)
                memo[id(value)] = nn.Parameter(fresh, value.requires_grad) if is_parameter else fresh
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # whatever somebody's class may raise; a lock or an open file has no copy
        # What torch does not copy without numbers it complains of in its log, once is enough.
        fakes = any(isinstance(value, FakeTensor) for value in (instead or {}).values())
        which = _WHOLE if fakes else _uncopied(model)
        what = f"{which} cannot be copied: {type(error).__name__}: {error}"
        raise RefusedError(Problem(what, "model", _COPYABLE)) from error
    if shared := _shared(model, twin, {id(value) for value in (instead or {}).values()}):
        raise RefusedError(Problem(f"a copy of the model has {shared} in common with it", "model", _APART))
    return twin


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
