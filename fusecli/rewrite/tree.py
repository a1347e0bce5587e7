"""A module tree that is looked up and edited by path in constant time."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import nn

from fusecli.nn.duplicate import duplicate
from fusecli.nn.shallow import shallow_copy

# Where a fused model keeps the names of its groups, so that each can be judged by itself and none is fused
# twice. Empty: a custom fuser took part, so that names do not tell all that was done.
_GROUPS = "_fusecli_groups"
_OWN = "_fusecli_own"
_PLAIN = "_fusecli_plain"


class ModuleTree:
    """`model` and its modules by path, every alias included; edits are seen by later look-ups.

    What is changed is changed in a module that only the tree has (`renewed`): a model may hold its modules
    a second time, in a list or a closure, and run them through that.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._fresh: set[str] = set()  # the paths of modules that were put there by this tree
        self._names: dict[int, list[str]] = {}

    def __getitem__(self, path: str) -> nn.Module:
        return self.modules[path]

    @property
    def rules_of_groups(self) -> dict[tuple[str, ...], str]:
        """The groups that fusecli has fused in this model already, each with its rules, joined by "+"."""
        noted = self.model.__dict__.get(_GROUPS)
        return {tuple(group): rule for group, rule in json.loads(noted)} if noted else {}

    def note_groups(self, groups: Mapping[tuple[str, ...], str], *, custom: bool) -> None:
        """Adds to `rules_of_groups`, unless custom fusers took part, now or before."""
        state, earlier = self.model.__dict__, self.rules_of_groups
        known = {} if custom or state.get(_GROUPS) == "" else {**earlier, **groups}
        # Text, which torch.jit.script takes as an attribute. Empty: names do not tell all that was done.
        state[_GROUPS] = json.dumps([[list(group), rule] for group, rule in known.items()]) if known else ""

    @property
    def own_copies(self) -> tuple[str, ...]:
        """The modules that fusecli has given a copy of their own in this model."""
        roots: tuple[str, ...] = self.model.__dict__.get(_OWN, ())
        return roots

    @property
    def made_plain(self) -> tuple[str, ...]:
        """The layers of this model whose computed weights fusecli has made plain."""
        paths: tuple[str, ...] = self.model.__dict__.get(_PLAIN, ())
        return paths

    def note_plain(self, path: str) -> None:
        self.model.__dict__[_PLAIN] = tuple(dict.fromkeys((*self.made_plain, path)))
        for name in [name for name in self.modules if name.startswith(f"{path}.parametrizations")]:
            del self.modules[name]

    def replace(self, path: str, module: nn.Module) -> None:
        """Puts `module` where `path` leads; the root itself has no place to be replaced at."""
        parent, _, name = path.rpartition(".")
        if self._stands_in_fresh(parent):
            self.renewed(parent)  # the module that stood around it has the same children
        # Not setattr: a class may define a property of the child's name, and a __setattr__ of its own.
        self.modules[parent]._modules[name] = module
        self.modules[path] = module
        self._fresh.add(path)

    def renewed(self, path: str) -> nn.Module:
        """The module at `path`, to be changed: another object than the one that stood there, of the same
        class, with the same attributes and tensors, under all names that it had.

        The model itself stays the object that it is.
        """
        old = self.modules[path]
        if not path or path in self._fresh:
            return old
        new, names = shallow_copy(old), self._names_of(path, old)
        for name in names:
            self.replace(name, new)
        self._names[id(new)] = names
        if new._modules:  # the one that stood there has the same children
            below = tuple(f"{name}." for name in names)
            self._fresh = {name for name in self._fresh if not name.startswith(below)}
        return new

    def _names_of(self, path: str, module: nn.Module) -> list[str]:
        if not self._names:
            for name, known in self.modules.items():
                self._names.setdefault(id(known), []).append(name)
        names = self._names.get(id(module), ())
        return [name for name in names if self.modules.get(name) is module] or [path]

    def _stands_in_fresh(self, path: str) -> bool:
        """Whether a module around the one at `path` was renewed and it was not: the new one and the one that
        stood there both have it."""
        if path in self._fresh:
            return False
        return any(path[:end] in self._fresh for end, letter in enumerate(path) if letter == ".")

    def own(self, path: str) -> None:
        """Gives the module at `path` a copy of its own, unless it has been given one."""
        if path in self.own_copies:
            return
        self.model.__dict__[_OWN] = (*self.own_copies, path)
        copied = duplicate(self.modules[path])
        self.replace(path, copied)
        self._fresh.discard(path)  # it may hold its modules a second time too
        for name, child in copied.named_modules(remove_duplicate=False):
            self.modules[f"{path}.{name}" if name else path] = child
        self._names = {}


def stand_in_model(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A model that has nothing but `modules`, each at its path: enough of a tree to edit and to probe."""
    root = nn.Module()
    for path, module in modules.items():
        *parents, name = path.split(".")
        node = root
        for part in parents:
            if part not in node._modules:
                node._modules[part] = nn.Module()
            node = node._modules[part]  # type: ignore[assignment]  # Optional in the stubs, set above
        node._modules[name] = module
    return root.eval()
