"""The root of the fused module classes."""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class FusedModule(nn.Sequential):
    """Modules that run as one, in order, under the names "0", "1", ...

    A subclass lists the types it takes in `members`; a subclass of such a type is fine, which is
    where the classes of torch.ao are stricter. The mode (train or eval) follows the first member.
    Raises TypeError naming the types, for anything else.
    """

    members: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init__(self, *modules: nn.Module) -> None:
        if len(modules) != len(self.members) or not all(map(isinstance, modules, self.members)):
            wanted = ", ".join(member.__name__ for member in self.members)
            given = ", ".join(type(module).__name__ for module in modules)
            raise TypeError(f"{type(self).__name__} takes ({wanted}), not ({given})")
        super().__init__(*modules)
        if modules:
            # Only the flag: the members keep the modes they came with.
            self.training = modules[0].training
