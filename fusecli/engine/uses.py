"""Under how many names modules and tensors are known: what a fold at one name would change at another."""

from __future__ import annotations

from torch import nn

from fusecli.errors import require
from fusecli.graph.memory import same_memory
from fusecli.rewrite import ModuleTree


class Uses:
    """Under how many names each module of a model is known, and which names are the same memory."""

    def __init__(self, tree: ModuleTree) -> None:
        self._names: dict[int, list[str]] = {}
        for path, module in tree.modules.items():
            self._names.setdefault(id(module), []).append(path)
        self._tied = {name: names - {name} for names in same_memory(tree.model) for name in names}

    def require_single(self, path: str, module: nn.Module) -> None:
        names = self._names[id(module)]
        require(
            len(names) == 1,
            "shared-module",
            f"{path} is the same module as another name of the model",
            evidence=(f"its names are {', '.join(names)}",),
            remedy="give each place its own module, or say `shared: clone` in the spec",
        )
        own = [f"{path}.{name}" for name in (*module._parameters, *module._buffers)]
        tied = {name: sorted(self._tied[name]) for name in own if name in self._tied}
        require(
            not tied,
            "tied-weights",
            f"{', '.join(tied)} is the same memory as another tensor, which the fold would change too",
            evidence=tuple(f"{name} is also {', '.join(others)}" for name, others in tied.items()),
            remedy="untie it (clone the parameter), or say `shared: clone` in the spec",
        )
