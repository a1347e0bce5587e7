"""Under how many names modules and parameters are known: what a fold at one name would change at another."""

from __future__ import annotations

from collections import Counter

from torch import nn

from fusecli.errors import require
from fusecli.rewrite import ModuleTree


class Uses:
    """Under how many names each module and each parameter of a model is known."""

    def __init__(self, tree: ModuleTree) -> None:
        self._modules = Counter(id(module) for module in tree.modules.values())
        owners = {id(module): module for module in tree.modules.values()}
        self._parameters = Counter(
            id(parameter)
            for module in owners.values()
            for parameter in module._parameters.values()
            if parameter is not None
        )

    def require_single(self, path: str, module: nn.Module) -> None:
        require(
            self._modules[id(module)] == 1,
            "shared-module",
            f"{path} is the same module as another name of the model",
            remedy="give each place its own module",
        )
        tied = [n for n, p in module.named_parameters() if self._parameters[id(p)] > 1]
        names = ", ".join(f"{path}.{name}" for name in tied)
        require(
            not tied,
            "tied-weights",
            f"{names} is tied to a parameter of another module, which the fold would change too",
            remedy="untie it (clone the parameter) before fusing",
        )
