"""What a model holds a second time outside of its module tree: in a list, a dict, a closure, any object.

A fold puts new objects into the tree. What runs a module through such a place goes on running the old one.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fusecli.graph.kinds import FOLDABLE, kind_of

_OWN = frozenset(vars(nn.Module()))
_PLAIN = (str, bytes, int, float, complex, bool, type, types.ModuleType, type(None))
# An attribute may lead to anything, a whole data set with it. Nobody keeps layers that far away.
_MOST = 20_000


@dataclass(frozen=True)
class Hold:
    """The attribute `name` ("layers", "block.layers") holds the module at `path`, or its tensor `tensor`.

    function  it is held by a function: the model is copied without that, so that a copy calls the original
    """

    name: str
    path: str
    tensor: str = ""
    function: bool = False


def holds(model: nn.Module) -> Iterator[Hold]:
    """Every module of the tree, parameter and buffer that an attribute leads to, past the tree itself."""
    paths: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules():
        paths[id(module)] = (path, "")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                paths.setdefault(id(tensor), (path, name))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OWN and not isinstance(value, _PLAIN):
                yield from _below(f"{path}.{name}" if path else name, value, module, paths)


def _below(name: str, value: Any, owner: nn.Module, paths: Mapping[int, tuple[str, str]]) -> Iterator[Hold]:
    waiting: deque[tuple[Any, bool]] = deque([(value, False)])
    seen: dict[int, Any] = {}
    while waiting and len(seen) < _MOST:
        current, function = waiting.popleft()
        if isinstance(current, _PLAIN) or id(current) in seen:
            continue
        seen[id(current)] = current
        if id(current) in paths:
            path, tensor = paths[id(current)]
            yield Hold(name, path, tensor, function)
        elif isinstance(current, types.MethodType) and current.__self__ is owner:
            continue  # of the module that has it: a copy of the module has it bound to itself
        elif not isinstance(current, Tensor):
            through = function or isinstance(current, types.FunctionType)
            waiting.extend((inner, through) for inner in _inside(current))


def _inside(value: Any) -> Iterator[Any]:
    """What one object holds, where looking runs nobody's code."""
    if isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, dict | types.MappingProxyType):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        if not (value.__module__ or "").startswith("torch."):
            yield from _enclosed(value)
    elif not type(value).__module__.startswith("torch.") or isinstance(value, nn.Module):
        # A module that is not in the tree, such as a Sequential around modules that are; or any object.
        try:
            state = object.__getattribute__(value, "__dict__")
        except AttributeError:
            state = {}
        yield from state.values()
        yield from _slots(value)


def _slots(value: Any) -> Iterator[Any]:
    for cls in type(value).__mro__:
        for slot in vars(cls).values():
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    yield slot.__get__(value)
                except AttributeError:  # it has no value yet
                    continue


def _enclosed(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that has no value yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def modules_held(model: nn.Module) -> dict[str, Hold]:
    """The first that holds it, for each module of the tree that is held; the model itself is the path ""."""
    found: dict[str, Hold] = {}
    for hold in holds(model):
        if not hold.tensor:
            found.setdefault(hold.path, hold)
    return found


def changes_in_a_fold(module: nn.Module) -> bool:
    """Whether a fold may put another object in its place: a layer, a norm, a scale. What stands around them
    stays, and an activation may run twice."""
    kind = kind_of(module)
    return kind in FOLDABLE or (kind == "other" and not any(True for _ in module.children()))
