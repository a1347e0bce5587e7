"""Another object for the same module: to be changed, while whoever holds the first keeps it as it was."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from typing import Any

from torch import nn

# What torch keeps of every module in containers of its own: tensors, children, hooks.
_REGISTRIES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of the same class with the same attributes, tensors, children and hooks.

    What may be added to or taken from it is its own. Functions that are bound to the module (a forward that
    was put on the instance, a hook that is a method of its own) are bound to the copy.
    """
    # Not copy.copy(): parametrized modules refuse it, because pickling them would not work.
    twin = object.__new__(type(module))
    state = twin.__dict__
    state.update(module.__dict__)
    for name in (name for name in _REGISTRIES if name in state):
        if name.endswith("hooks"):
            # The handle that removes a hook knows this very dictionary, and it is the copy that runs from now
            # on: the module keeps its hooks in another one.
            module.__dict__[name] = copy.copy(state[name])
            state[name].update({key: _hook(hook, module, twin) for key, hook in state[name].items()})
        else:
            state[name] = copy.copy(state[name])
    for name, value in state.items():
        if isinstance(value, types.MethodType | functools.partial):
            state[name] = _bound(value, module, twin)
    return twin


def _bound(function: Any, module: nn.Module, twin: nn.Module) -> Any:
    """The function with `twin` where it is bound to `module`."""
    if isinstance(function, types.MethodType) and function.__self__ is module:
        return types.MethodType(function.__func__, twin)
    if isinstance(function, functools.partial):
        called = _bound(function.func, module, twin)
        given = (twin if value is module else value for value in function.args)
        named = {key: twin if value is module else value for key, value in function.keywords.items()}
        return functools.partial(called, *given, **named)
    return function


def _hook(hook: Any, module: nn.Module, twin: nn.Module) -> Any:
    """The hook of `twin` that `hook` is of `module`."""
    owner = getattr(hook, "module", None)
    if isinstance(owner, weakref.ref) and owner() is module:
        # What torch puts around a hook on state dicts, to hand it the module that it was registered on.
        wrapped: Any = copy.copy(hook)
        wrapped.module, wrapped.hook = weakref.ref(twin), _bound(hook.hook, module, twin)
        return wrapped
    return _bound(hook, module, twin)
