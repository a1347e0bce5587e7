"""A spec as a tree that remembers where each value stands, whether it came from a file or from Python.

Both sources become the same tree, so both are read with the same strictness and the same messages;
they differ only in what a place looks like: `fuse.yaml:14:3` or `spec.groups[3]`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from fusecli.errors import Problem

Path = tuple[str | int, ...]


class Plain(str):
    """Unquoted text of a spec file: whether it is a name or a number depends on the key it stands under."""

    __slots__ = ()


class Place(NamedTuple):
    """Where something stands. Line 0 means that the label says it all."""

    line: int
    column: int
    label: str

    def __str__(self) -> str:
        return f"{self.label}:{self.line}:{self.column}" if self.line else self.label


class Finding(NamedTuple):
    """A problem whose place can still be compared, so that problems come out in the order of the file."""

    place: Place
    what: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """A value of the spec (a dict, list or tuple holds nodes), its place and the place of its key."""

    content: Any
    place: Place
    key_place: Place | None = None

    @property
    def headed(self) -> Place:
        """Where a reader looks for it: a collection is known by its key, a leaf stands for itself."""
        collection = isinstance(self.content, (dict, list, tuple))
        return self.key_place if self.key_place and collection else self.place


# Beyond this a list of problems helps nobody, and near misses for each would take their time.
MOST_PROBLEMS = 1000


def in_order(findings: Iterable[Finding], hidden: int = 0) -> tuple[Problem, ...]:
    """The findings as problems, sorted by line and column, each once; then how many are not shown."""
    ordered = sorted(dict.fromkeys(findings), key=lambda found: found.place[:2])
    problems = [Problem(found.what, str(found.place), found.fix) for found in ordered[:MOST_PROBLEMS]]
    hidden += len(ordered) - len(problems)
    more = [Problem(f"{hidden} more problems are not shown")] if hidden else []
    return (*problems, *more)


def find(root: Node, path: Path) -> Node:
    """The node at `path`, passing over steps that the text does not have (the `modules` of a bare list)."""
    node = root
    for step in path:
        node = _child(node, step) or node
    return node


def _child(node: Node, step: str | int) -> Node | None:
    if isinstance(node.content, dict):
        return node.content.get(step)
    if isinstance(node.content, (list, tuple)) and isinstance(step, int):
        return next(iter(node.content[step : step + 1]), None)
    return None


def unwrap(node: Node) -> object:
    """The value without its places: dicts, lists, tuples and leaves."""
    if isinstance(node.content, dict):
        return {key: unwrap(child) for key, child in node.content.items()}
    if isinstance(node.content, (list, tuple)):
        return type(node.content)(unwrap(child) for child in node.content)
    return node.content


def written(path: Path, root: str) -> str:
    """`path` as Python would write it below `root`: `spec.groups[3]`."""
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"{root}{steps}" if root else steps.lstrip(".")
