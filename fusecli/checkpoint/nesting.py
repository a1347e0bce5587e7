"""Where in a training checkpoint the model's state dict is, decided by what the entries hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusecli.checkpoint.trouble import misused, unreadable

# With one of these at the top the others (an EMA copy, a loss with buffers) are companions of the model.
_PRIMARY = ("state_dict", "model_state_dict", "model")
_DEPTH = 3
_EXPLAIN = "save the state dict itself: torch.save(model.state_dict(), 'weights.pt')"


@dataclass(frozen=True)
class Choice:
    """The chosen state dict or module, the key it stood under (None: at the top), and what to tell."""

    state: Mapping[str, Any] | nn.Module
    key: str | None
    notices: tuple[str, ...] = ()


def choose_state(path: Path, root: Any, key: str | None) -> Choice:
    """The state dict of the file's object; UsageError when only the user can say which one is meant."""
    if key is not None:
        return Choice(_follow(path, root, key), key)
    if isinstance(root, nn.Module):
        return Choice(root, None)
    if not isinstance(root, Mapping):
        raise unreadable(path, f"holds a {_describe(root)}, not a state dict", _EXPLAIN)
    found = _candidates(root)
    primary = [name for name in _PRIMARY if name in found]
    if _is_state(root) and not primary and _outweighs(root, found):
        return Choice(root, None)
    if not found:
        raise unreadable(path, f"no state dict in it (keys: {_listing(root)})", _EXPLAIN)
    if len(found) > 1 and len(primary) != 1:
        what = f"holds several state dicts: {', '.join(found)}"
        raise misused(path, what, f"choose one in the spec, e.g. checkpoint: {{key: {next(iter(found))}}}")
    chosen = primary[0] if primary else next(iter(found))
    return Choice(found[chosen], chosen, tuple(_notices(root, found, chosen)))


def _candidates(root: Mapping[Any, Any], prefix: str = "", depth: int = _DEPTH) -> dict[str, Any]:
    """Every state dict or module below the root by its dotted key, outermost only."""
    found: dict[str, Any] = {}
    for key, value in root.items():
        name = f"{prefix}{key}"
        if isinstance(value, nn.Module) or _is_state(value):
            found[name] = value
        elif isinstance(value, Mapping) and depth > 1 and not _is_optimizer(value):
            found.update(_candidates(value, f"{name}.", depth - 1))
    return found


def _is_state(value: Any) -> bool:
    """Text keys, and tensors for at least half of the values (others: extra state, version numbers)."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    tensors = sum(isinstance(item, torch.Tensor) for item in value.values())
    return 0 < len(value) <= 2 * tensors


def _outweighs(root: Mapping[Any, Any], found: Mapping[str, Any]) -> bool:
    """Whether the tables below are extra state of the root, not the root a mean and std beside them."""
    return all(isinstance(state, Mapping) and len(state) <= len(root) for state in found.values())


def _is_optimizer(value: Mapping[Any, Any]) -> bool:
    return "param_groups" in value and "state" in value


def _follow(path: Path, root: Any, key: str) -> Mapping[str, Any] | nn.Module:
    value = _lookup(root, key)
    if isinstance(value, nn.Module) or _has_tensors(value):
        return value  # type: ignore[no-any-return]
    found = _candidates(root) if isinstance(root, Mapping) else {}
    what = f"no state dict under the key '{key}'" if value is None else f"'{key}' is a {_describe(value)}"
    choice = (
        f"choose one of: {', '.join(found)}" if found else "leave out checkpoint.key: the file is not nested"
    )
    raise misused(path, what, choice)


def _lookup(value: Any, key: str) -> Any:
    """The entry under a dotted key; keys may hold dots themselves, so the longest one wins."""
    if not isinstance(value, Mapping):
        return None
    if key in value:
        return value[key]
    parts = key.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        head, rest = ".".join(parts[:cut]), ".".join(parts[cut:])
        if head in value and (found := _lookup(value[head], rest)) is not None:
            return found
    return None


def _has_tensors(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(item, torch.Tensor) for item in value.values())
    )


def _notices(root: Mapping[Any, Any], found: Mapping[str, Any], chosen: str) -> list[str]:
    others = [name for name in found if name != chosen]
    tops = {name.split(".")[0] for name in found}
    ignored = [str(key) for key in root if str(key) not in tops]
    notices = [f"the state dict was found under '{chosen}'"]
    if others:
        notices.append(f"'{', '.join(others)}' also exists; checkpoint: {{key: {others[0]}}} chooses it")
    if ignored:
        notices.append(f"other entries of the file were ignored: {', '.join(ignored)}")
    return notices


def _listing(root: Mapping[Any, Any]) -> str:
    names = [str(key) for key in list(root)[:8]]
    return ", ".join(names) + (", ..." if len(root) > len(names) else "") if names else "none"


def _describe(value: Any) -> str:
    return "single tensor" if isinstance(value, torch.Tensor) else type(value).__name__
