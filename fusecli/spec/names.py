"""The module names of a model as a tree of dotted components.

Patterns and near misses follow the tree, so no question compares every name with every other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from fusecli.spec.wording import closest

Binding = tuple[str, ...]

_MOST_COMPARED = 500


@dataclass(slots=True)
class _Branch:
    """One component of a name; `order` is the position of the name that ends here, or None."""

    children: dict[str, _Branch] = field(default_factory=dict)
    order: int | None = None
    excluded: bool = False


class NameTree:
    """The names in the order they were given, and questions about them."""

    def __init__(self, names: Collection[str], exclude: Collection[str] = ()) -> None:
        self.order = {name: i for i, name in enumerate(names) if name}
        self.exclude = exclude

    def __contains__(self, name: str) -> bool:
        return name in self.order

    @cached_property
    def _root(self) -> _Branch:
        root = _Branch()
        for name, order in self.order.items():
            branch = root
            for part in name.split("."):
                branch = branch.children.setdefault(part, _Branch())
            branch.order = order
        for pattern in self.exclude:
            for branch, _ in _walk(root, pattern):
                branch.excluded = True
        return root

    def covers(self, pattern: str) -> bool:
        """True if `pattern` matches a name or something that names stand below."""
        return any(True for _ in _walk(self._root, pattern))

    def bindings(self, pattern: str) -> list[Binding]:
        """What the `*` of `pattern` stand for in each name that it matches, in the order of the names."""
        found = ((branch.order, bound) for branch, bound in _walk(self._root, pattern))
        return [bound for _, bound in sorted((order, bound) for order, bound in found if order is not None)]

    def excluded(self, name: str) -> bool:
        """True if an exclude pattern matches `name` or something above it."""
        branch: _Branch | None = self._root
        for part in name.split("."):
            branch = branch.children.get(part) if branch else None
            if branch and branch.excluded:
                return True
        return False

    def nearest(self, name: str) -> str | None:
        """The existing name that `name` was probably meant to be; patterns are taken as they stand."""
        return self._by_component(name) or self._by_suffix(name) or self._by_look(name)

    def _by_component(self, name: str) -> str | None:
        branch, parts = self._root, []
        for part in name.split("."):
            near = _near_child(branch, part)
            if near is None:
                return None
            parts.append(near)
            branch = branch.children[near]
        return ".".join(parts) if branch.order is not None else None

    def _by_suffix(self, name: str) -> str | None:
        """A wrapper's prefix too few, or one too many that the model does not have."""
        foreign = name.split(".", 1)[0] not in self._root.children
        ends = (n for n in self.order if n.endswith(f".{name}") or (foreign and name.endswith(f".{n}")))
        return min(ends, key=lambda n: abs(len(n) - len(name)), default=None)

    def _by_look(self, name: str) -> str | None:
        leaf = name.rpartition(".")[2]
        same_leaf = (n for n in self.order if n.rpartition(".")[2] == leaf)
        pool = list(islice(same_leaf, _MOST_COMPARED)) or list(islice(self.order, _MOST_COMPARED))
        return closest(name, pool)


def _near_child(branch: _Branch, part: str) -> str | None:
    if part in branch.children:
        return part
    if matching := next((child for child in branch.children if glob(part, child) is not None), None):
        return matching
    alike = (child for child in branch.children if abs(len(child) - len(part)) <= 3)
    return closest(part, islice(alike, _MOST_COMPARED))


def _walk(root: _Branch, pattern: str) -> Iterator[tuple[_Branch, Binding]]:
    """Every branch that `pattern` leads to; only components with a `*` look at more than one child."""
    reached: list[tuple[_Branch, Binding]] = [(root, ())]
    for part in pattern.split("."):
        if "*" in part:
            reached = [
                (child, bound + more)
                for branch, bound in reached
                for text, child in branch.children.items()
                if (more := glob(part, text)) is not None
            ]
        else:
            reached = [(b.children[part], bound) for b, bound in reached if part in b.children]
    return iter(reached)


def glob(pattern: str, text: str) -> Binding | None:
    """What each `*` of `pattern` stands for in `text`, as short as possible from the left; None: no match.

    Runs in linear time: a pattern and a name that were made for each other cannot stall it, as they
    would a regular expression.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return () if pattern == text else None
    *middle, last = rest
    at, end = len(first), len(text) - len(last)
    if end < at or not text.startswith(first) or not text.endswith(last):
        return None
    bound: list[str] = []
    for piece in middle:
        hit = text.find(piece, at, end)
        if hit < 0:
            return None
        bound.append(text[at:hit])
        at = hit + len(piece)
    return (*bound, text[at:end])
