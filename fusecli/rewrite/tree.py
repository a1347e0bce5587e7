"""A module tree that is looked up and edited by path in constant time."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping

from torch import nn

# Where a fused model keeps the names of its groups, so that each can be judged by itself and none is fused
# twice. Empty: a custom fuser took part, so that names do not tell all that was done.
_GROUPS = "_fusecli_groups"
_OWN = "_fusecli_own"
_PLAIN = "_fusecli_plain"


class ModuleTree:
    """`model` and its modules by path, every alias included; edits are seen by later look-ups."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))

    def __getitem__(self, path: str) -> nn.Module:
        return self.modules[path]

    @property
    def fused_groups(self) -> tuple[tuple[str, ...], ...]:
        """The groups that fusecli has fused in this model already."""
        return tuple(self.rules_of_groups)

    @property
    def rules_of_groups(self) -> dict[tuple[str, ...], str]:
        """Those groups, each with its rules, joined by "+"."""
        noted = self.model.__dict__.get(_GROUPS)
        return {tuple(group): rule for group, rule in json.loads(noted)} if noted else {}

    def note_groups(self, groups: Mapping[tuple[str, ...], str], *, custom: bool) -> None:
        """Adds to `fused_groups`, unless custom fusers took part, now or before."""
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
        # Not setattr: a class may define a property of the child's name, and a __setattr__ of its own.
        self.modules[parent]._modules[name] = module
        self.modules[path] = module

    def own(self, path: str) -> None:
        """Gives the module at `path` a copy of its own, unless it has been given one."""
        if path in self.own_copies:
            return
        self.model.__dict__[_OWN] = (*self.own_copies, path)
        copied = copy.deepcopy(self.modules[path])
        self.replace(path, copied)
        for name, child in copied.named_modules(remove_duplicate=False):
            self.modules[f"{path}.{name}" if name else path] = child


def plant(modules: Mapping[str, nn.Module]) -> nn.Module:
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
