"""A module tree that is looked up and edited by path in constant time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class ModuleTree:
    """`model` and its modules by path, every alias included; edits are seen by later look-ups."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))

    def __getitem__(self, path: str) -> nn.Module:
        return self.modules[path]

    def replace(self, path: str, module: nn.Module) -> None:
        """Puts `module` where `path` leads; the root itself has no place to be replaced at."""
        parent, _, name = path.rpartition(".")
        # Not setattr: a class may define a property of the child's name, and hooks of __setattr__ are not ours to run.
        self.modules[parent]._modules[name] = module
        self.modules[path] = module


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
