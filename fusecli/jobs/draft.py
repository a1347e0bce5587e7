"""A spec to begin with: the candidate pairs as groups, and a place for what only the user knows."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence

from fusecli.contents import Candidate, ModuleFacts, Role
from fusecli.errors import UsageError
from fusecli.spec.wildcards import bind_lists

_PLAIN = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
_DIGITS = re.compile(r"\d+")
_WIDTH = 76
_SIDE = 64  # a spatial size that most networks take

Pair = tuple[str, str]


def draft_spec(
    nesting: str | None, modules: Sequence[ModuleFacts], candidates: Sequence[Candidate], ordered: bool
) -> str:
    """The YAML text; "" without candidates. Its factory and inputs are to be filled in.

    ordered  the first layer of `modules` may be the model's first
    """
    if not candidates:
        return ""
    lines = ["version: 1"]
    if nesting is not None:
        lines.append(f"checkpoint: {{key: {_scalar(nesting)}}}")
    lines += [
        'model: {factory: "your_package.models:build"}  # or "net.py:build"',
        "inputs:  # one entry for each argument of forward; the shape is a guess",
        f"  - {{shape: {_input_shape(modules if ordered else ())}}}",
        "groups:  # guesses: strike out what does not follow each other",
        *(line for group in _groups(candidates, [m.path for m in modules if m.path]) for line in group),
    ]
    return "\n".join(lines) + "\n"


def _input_shape(modules: Sequence[ModuleFacts]) -> list[int]:
    """What the first layer takes, as far as its weight tells; images where the first is not known."""
    weight = next((m.shape("weight") or () for m in modules if m.role is Role.LAYER), (0, 3, 0, 0))
    return [2, weight[1], *(_SIDE for _ in weight[2:])]


def _groups(candidates: Sequence[Candidate], names: Collection[str]) -> Iterator[list[str]]:
    """The entries of `groups`; pairs that a pattern stands for, all of them and no other, are one entry."""
    families: dict[Pair, list[Pair]] = {}
    for candidate in candidates:
        pair = (candidate.layer, candidate.norm)
        families.setdefault(_pattern(*pair), []).append(pair)
    for pattern, pairs in families.items():
        if len(pairs) > 1 and _binds(pattern, pairs, names):
            yield _entry(pattern, f"  # {len(pairs)}")
        else:
            yield from (_entry(pair) for pair in pairs)


def _pattern(layer: str, norm: str) -> Pair:
    """Both names with * for each number in the path that they share."""
    first, second = layer.split("."), norm.split(".")
    for i, (one, other) in enumerate(zip(first[:-1], second[:-1], strict=False)):
        if one != other:
            break
        first[i] = second[i] = _DIGITS.sub("*", one)
    return ".".join(first), ".".join(second)


def _binds(pattern: Pair, pairs: Sequence[Pair], names: Collection[str]) -> bool:
    try:
        return {group.modules for group in bind_lists([list(pattern)], names)} == set(pairs)
    except UsageError:  # a name that the pattern language cannot say, such as one with a * of its own
        return False


def _entry(pair: Pair, remark: str = "") -> list[str]:
    first, second = map(_scalar, pair)
    line = f"  - [{first}, {second}]{remark}"
    if len(line) <= _WIDTH:
        return [line]
    opening = f"  - [{first},"
    # A comment that a narrow page breaks is no comment any more.
    return [opening + (remark if len(opening + remark) <= _WIDTH else ""), f"     {second}]"]


def _scalar(text: str) -> str:
    """A name as YAML reads it back; what JSON writes in quotes, YAML reads."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
