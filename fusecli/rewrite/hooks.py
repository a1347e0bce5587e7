"""Forward hooks: which survive a fusion, moving those, and naming the ones that are lost.

Kept, and called once each: pre-hooks of the first member, forward hooks of the last (as torch.ao means to).
Every other hook of a folded member watched a tensor that no longer exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

# torch keeps the options of a hook in sibling dicts under the same id: they have to travel together.
PRE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
POST = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
BACKWARD = ("_backward_pre_hooks", "_backward_hooks")


def move_hooks(source: nn.Module, target: nn.Module, registries: tuple[str, ...]) -> None:
    """Moves the hooks of `registries` from one module to the other, in order and with their options."""
    for registry in registries:
        moving = _registry(source, registry)
        _registry(target, registry).update(moving)
        moving.clear()


def take_hooks(module: nn.Module, registries: tuple[str, ...]) -> Iterator[str]:
    """Removes the hooks of `registries` and yields a readable name for each one that is lost."""
    for registry in registries:
        hooks = _registry(module, registry)
        if registry in (PRE[0], POST[0], *BACKWARD):
            kind = registry.strip("_").removesuffix("s").replace("_", " ")
            yield from (f"{kind} {_name(hook)}" for hook in hooks.values())
        hooks.clear()


def has_hooks(module: nn.Module, registries: tuple[str, ...]) -> bool:
    """Whether there is anything in `registries`."""
    return any(_registry(module, registry) for registry in registries)


def _registry(module: nn.Module, name: str) -> dict[int, Any]:
    registry: dict[int, Any] = module.__dict__[name]
    return registry


def _name(hook: object) -> str:
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__
