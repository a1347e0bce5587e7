"""The modules of a checkpoint in a few lines: repeated blocks are one line, with * for their numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fusecli.contents import ModuleFacts, Role, TensorFacts

# As many lines as stay in view together with the rest.
READABLE = 24
_DIGITS = re.compile(r"\d+")
_NAMED = 4


@dataclass(frozen=True)
class Family:
    """Modules whose paths differ in numbers only and that hold the same names; `text` describes them all."""

    pattern: str
    count: int
    role: Role
    text: str


def families(modules: Sequence[ModuleFacts]) -> list[Family]:
    """As few as needed to be read at once, in order of first appearance: numbers inside of the path go
    first, then those at its end, because conv1 and conv2 of one block are rarely the same layer."""
    found: list[Family] = []
    for pattern in (str, _blocks, _numbers):
        found = list(_grouped(modules, pattern))
        if len(found) <= READABLE:
            break
    return found


def _blocks(path: str) -> str:
    head, dot, leaf = path.rpartition(".")
    return _numbers(head) + dot + leaf


def _numbers(path: str) -> str:
    return _DIGITS.sub("*", path)


def _grouped(modules: Sequence[ModuleFacts], pattern: Callable[[str], str]) -> Iterator[Family]:
    groups: dict[tuple[object, ...], list[ModuleFacts]] = {}
    for module in modules:
        forms = tuple((tensor.name, len(tensor.shape)) for tensor in module.tensors)
        groups.setdefault((pattern(module.path), module.role, forms), []).append(module)
    for group in groups.values():
        path = group[0].path if len(group) == 1 else pattern(group[0].path)
        yield Family(path or "(the model itself)", len(group), group[0].role, _described(group))


def _described(group: Sequence[ModuleFacts]) -> str:
    if group[0].role is Role.NORM:
        channels = _range(
            [(module.shape("running_var") or (0,))[0] for module in group if module.shape("running_var")]
        )
        known = {tensor.name for tensor in group[0].tensors}
        return f"norm of {channels or '?'} channels{'' if 'weight' in known else ', not affine'}"
    if group[0].role is Role.REPARAMETRIZED:
        return f"a weight computed from {', '.join(t.name for t in group[0].tensors if t.name != 'bias')}"
    columns = list(zip(*(module.tensors for module in group), strict=True))
    parts = [_tensors(column) for column in columns[:_NAMED]]
    if len(columns) > _NAMED:
        parts.append(f"{len(columns) - _NAMED} more")
    return ", ".join(parts)


def _tensors(column: Sequence[TensorFacts]) -> str:
    """weight [16..64, 3, 3, 3]: the smallest and the largest size of each axis. A bias needs no shape."""
    name = column[0].name
    if name == "bias":
        return name
    sizes = ", ".join(map(_range, zip(*(tensor.shape for tensor in column), strict=True)))
    return f"{name} [{sizes}]"


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low}..{high}"
