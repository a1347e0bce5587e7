"""Tensors of a module that are computed from others (by weight_norm, spectral_norm, pruning, adapters or
any parametrization): finding them, and making plain parameters of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm

from fusecli.nn.adapted import Adapted

# torch.nn.utils: what the hooks of each compute the tensor `name` from.
_SOURCES = ("g", "v", "orig", "mask", "u")
_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
_MARKS = tuple(
    (f"{name}_{mark}", name, how)
    for name in ("weight", "bias")
    for mark, how in (("g", "weight_norm"), ("mask", "pruning"), ("orig", "spectral_norm"))
)
_STATE_HOOKS = (SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)


def computes(hook: object) -> bool:
    """Whether a forward pre-hook is part of what the module computes: torch's own, which make a weight."""
    return isinstance(hook, _HOOKS)


def computed_tensor(module: nn.Module) -> tuple[str, str]:
    """The weight or bias that is no tensor of its own, and what computes it; empty if there is none."""
    if isinstance(module, Adapted):
        return "weight", "an adapter"
    for name in ("weight", "bias") if parametrize.is_parametrized(module) else ():
        if parametrize.is_parametrized(module, name):
            return name, "parametrize"
    for mark, name, how in _MARKS:
        if mark in module._parameters or mark in module._buffers:
            return name, how
    return "", ""


def is_source(local: str) -> bool:
    """Whether a tensor of a layer, by its name in it, is one that its weight or bias is computed from."""
    if local.startswith("parametrizations.") or local in Adapted.SOURCES:
        return True
    name, _, mark = local.partition("_")
    return name in ("weight", "bias") and mark in _SOURCES


@torch.no_grad()
def make_plain(module: nn.Module) -> None:
    """What is computed becomes a parameter with the value that the module, as it stands, gives it; hooks and
    parametrizations are gone. A module that is plain already is not changed.

    Not torch's remove_parametrizations: it takes the property off the class, which copies share.
    """
    if isinstance(module, Adapted):
        module.make_plain()
    made = {name: (value, wants) for name, value, wants in (*_hooked(module), *_parametrized(module))}
    # A copy: what was computed may be a tensor of somebody else, where nothing is done to it.
    for name, (value, wants) in made.items():
        module.__dict__.pop(name, None)
        module._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=wants)


def _hooked(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    hooks = {number: hook for number, hook in module._forward_pre_hooks.items() if computes(hook)}
    for hook in hooks.values():
        hook(module, ())
    for number, hook in hooks.items():
        found: Any = hook
        name = str(found._tensor_name if isinstance(hook, BasePruningMethod) else found.name)
        del module._forward_pre_hooks[number]
        sources = [f"{name}_{mark}" for mark in _SOURCES]
        wants = any(p.requires_grad for s in sources if (p := module._parameters.get(s)) is not None)
        for source in sources:
            module._parameters.pop(source, None)
            module._buffers.pop(source, None)
            module._non_persistent_buffers_set.discard(source)
        yield name, module.__dict__[name], wants
    registries: Any = (module._state_dict_hooks, module._load_state_dict_pre_hooks)
    for registry in registries if hooks else ():
        # torch wraps the second kind, and says which hook is inside.
        own = [n for n, hook in registry.items() if isinstance(getattr(hook, "hook", hook), _STATE_HOOKS)]
        for number in own:
            del registry[number]


def _parametrized(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    if not parametrize.is_parametrized(module):
        return
    lists: Any = module._modules["parametrizations"]
    found = [
        (name, _value(each), any(p.requires_grad for p in each.parameters())) for name, each in lists.items()
    ]
    del module._modules["parametrizations"]
    module.__class__ = type(module).__mro__[1]  # the class that torch has put its properties on top of
    yield from found


def _value(parametrization: Any) -> Tensor:
    """What a parametrization computes; on the meta device, where its code may ask for numbers, a tensor like
    the one it is computed from."""
    try:
        value: Tensor = parametrization()
        return value
    except Exception:  # whatever somebody's forward may raise
        original = getattr(parametrization, "original", None)
        if original is None or not original.is_meta:
            raise
        return torch.empty_like(original)
