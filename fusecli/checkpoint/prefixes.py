"""Names that wrappers left on the keys of a state dict, taken off again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusecli.checkpoint.trouble import misused, unreadable

# DataParallel and DistributedDataParallel wrap the whole model, so every key must carry this.
_LEADING = "module."
# torch.compile, FSDP and activation checkpointing may wrap any submodule. No model uses these names itself.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Renaming:
    """Every key's new name, and what was taken off, in the order it was taken off."""

    names: dict[str, str]
    prefixes: tuple[str, ...]


def strip_prefixes(
    path: Path, keys: Iterable[str], extra: Sequence[str] = (), followers: Iterable[str] = ()
) -> Renaming:
    """The names without wrapper prefixes and without those the spec lists.

    `followers` decide nothing, and lose what the keys lose.
    Raises UsageError if no key has a listed prefix, UnsafeError if two keys would get one name.
    """
    names = {key: key for key in keys}
    taken: list[str] = []
    _strip_known(names, taken)
    for prefix in extra:
        if _strip_listed(names, prefix):
            taken.append(prefix)
            _strip_known(names, taken)
        elif prefix not in taken:
            near = next(iter(names.values()), "")
            fix = f"remove it from the spec's checkpoint.strip_prefix (keys look like '{near}')"
            raise misused(path, f"no key begins with the prefix '{prefix}'", fix)
    _refuse_collision(path, names)
    return Renaming({**{key: _without(key, taken) for key in followers}, **names}, tuple(taken))


def _without(key: str, taken: Sequence[str]) -> str:
    for prefix in taken:
        key = _bare(key) if prefix.removesuffix(".") in _WRAPPERS else key.removeprefix(prefix)
    return key


def _strip_known(names: dict[str, str], taken: list[str]) -> None:
    """Wrappers nest in any order and number, so both kinds are taken off until neither is left."""
    while True:
        if any(_bare(name) != name for name in names.values()):
            found = {part for name in names.values() for part in name.split(".")}
            taken.extend(f"{wrapper}." for wrapper in _WRAPPERS if wrapper in found)
            names.update({key: _bare(name) for key, name in names.items()})
        if not names or not all(name.startswith(_LEADING) and name != _LEADING for name in names.values()):
            return
        taken.append(_LEADING)
        names.update({key: name.removeprefix(_LEADING) for key, name in names.items()})


def _bare(name: str) -> str:
    parts = name.split(".")
    return ".".join([*(part for part in parts[:-1] if part not in _WRAPPERS), parts[-1]])


def _strip_listed(names: dict[str, str], prefix: str) -> bool:
    """A prefix that the user names goes wherever it is found; nothing is left nameless."""
    hit = {key: name for key, name in names.items() if name.startswith(prefix) and name != prefix}
    names.update({key: name.removeprefix(prefix) for key, name in hit.items()})
    return bool(hit) and bool(prefix)


def _refuse_collision(path: Path, names: dict[str, str]) -> None:
    owners: dict[str, str] = {}
    for key, name in names.items():
        if name in owners:
            what = f"keys '{owners[name]}' and '{key}' would both be named '{name}' without their prefixes"
            raise unreadable(
                path, what, "rename one of them, or list fewer prefixes in checkpoint.strip_prefix"
            )
        owners[name] = key
