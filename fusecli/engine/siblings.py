"""Modules beside those of a group that never ran: other inputs may go there instead.

Of a list of modules that forward picks from, only what was picked is in the run. A group that lies within one
of them goes with it, wherever forward goes. A group that lies in one of them and outside of it too changes
what the others are given as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from fusecli.rewrite import ModuleTree


@dataclass
class Siblings:
    """The children of containers that no input has run. `called`: the modules that some input has called."""

    tree: ModuleTree
    called: Collection[str]
    _unrun: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._ran = {id(self.tree[path]) for path in self.called}

    def beside(self, members: Sequence[str]) -> tuple[str, ...]:
        """Those that a group depends on: children of a container that has a part of the group in another
        child, but not all of it in the same."""
        found = (
            path
            for container in self._around(members)
            if not _in_one_child(container, members)
            for path in self._children_that_never_ran(container)
        )
        return tuple(dict.fromkeys(found))

    def _around(self, members: Sequence[str]) -> Iterator[str]:
        """The containers that members are in, by name, outermost first."""
        names = {
            ".".join(parts[:count])
            for parts in (m.split(".") for m in members)
            for count in range(len(parts))
        }
        return (name for name in sorted(names) if self._is_container(self.tree[name]))

    def _is_container(self, module: nn.Module) -> bool:
        """Whether forward picks from its children: a list, a dict, or a Sequential that is never called."""
        picked = isinstance(module, nn.Sequential) and id(module) not in self._ran
        return picked or isinstance(module, nn.ModuleList | nn.ModuleDict)

    def _children_that_never_ran(self, container: str) -> tuple[str, ...]:
        if container not in self._unrun:
            self._unrun[container] = tuple(
                f"{container}.{name}" if container else name
                for name, child in self.tree[container].named_children()
                if not any(id(module) in self._ran for module in child.modules())
            )
        return self._unrun[container]


def _in_one_child(container: str, members: Sequence[str]) -> bool:
    prefix = f"{container}." if container else ""
    children = {
        member[len(prefix) :].partition(".")[0] if member.startswith(prefix) else None for member in members
    }
    return len(children) == 1
