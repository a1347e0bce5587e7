"""Models that have a say in how a state dict is loaded into them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

_OWN_WAYS = ("_load_from_state_dict", "load_state_dict")


def has_extra_state(model: nn.Module) -> bool:
    """Whether a module keeps something in the state dict that is no parameter and no buffer."""
    return any(type(module).get_extra_state is not nn.Module.get_extra_state for module in model.modules())


def loads_by_itself(model: nn.Module) -> bool:
    """Whether code that is not torch's own may read or change the tensors that are loaded."""
    return any(not _is_torchs(code) for module in model.modules() for code in _loading(module))


def adapts_names(model: nn.Module) -> bool:
    """Whether the model may take names that it has not got, such as those of an older version."""
    return any(True for module in model.modules() for _ in _hooks(module)) or loads_by_itself(model)


def versions_of(model: nn.Module) -> dict[str, dict[str, int]]:
    """The versions that the code of `loads_by_itself` is told: tensors as these classes write them today."""
    return {
        path: {"version": int(module._version)}
        for path, module in model.named_modules(remove_duplicate=False)
        if not all(map(_is_torchs, _loading(module)))
    }


def _loading(module: nn.Module) -> Iterator[Any]:
    yield from _hooks(module)
    for name in _OWN_WAYS:
        yield getattr(type(module), name)
        if name in vars(module):
            yield vars(module)[name]


def _hooks(module: Any) -> Iterator[Any]:
    for registry in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
        for hook in registry.values():
            yield getattr(hook, "hook", hook)  # torch wraps some, and says which hook is inside


def _is_torchs(code: Any) -> bool:
    while isinstance(code, partial):
        code = code.func
    name = getattr(code, "__module__", None) or type(code).__module__
    return name.partition(".")[0] == "torch"
