"""The closed vocabulary of structural edits, and the Rewrite that carries them.

An edit is plain data. `rewrite.apply` does it to a live tree, `rewrite.manifest` writes it down,
`rewrite.keys` says what it does to the names of tensors: three readings of one list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Own:
    """The module at `path` becomes a copy of its own: it was known under another name too, or its tensors
    were the same memory as others."""

    path: str


@dataclass(frozen=True)
class Plain:
    """The weight and bias of the layer at `path`, if computed from other tensors, become its own parameters;
    what they were computed from is gone. A layer that is plain already stays as it is."""

    path: str


@dataclass(frozen=True)
class Bias:
    """The layer at `path` gets a bias parameter if it has none; its class, forward and hooks stay."""

    path: str


@dataclass(frozen=True)
class Identity:
    """The module at `path` was folded into the layer at `into` and becomes nn.Identity.

    `last`: its forward hooks move to `into`, as torch.ao does for the last member of a group.
    Otherwise they are lost, like the forward hooks of `into`: the tensor they watched is gone.
    """

    path: str
    into: str
    last: bool = True


@dataclass(frozen=True)
class Passed:
    """The module at `path` was folded into the layers `members` that come after it and becomes nn.Identity.

    What it takes is still there, and so are its pre-hooks; what it gave is not, nor are the hooks on that.
    """

    path: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Zero:
    """The branch that ends in the module at `path` was added to the layer at `into`: it gives a scalar
    zero."""

    path: str
    into: str


@dataclass(frozen=True)
class Resize:
    """The layer at `path` gets other sizes: `sizes` are its attributes by name, each with one or more
    numbers, and its weight will have a shape to match."""

    path: str
    sizes: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Bordered:
    """The convolution at `path` becomes a fusecli.nn one that pads with its buffer `border`, one value for
    each input channel; its other tensors keep their names."""

    path: str


@dataclass(frozen=True)
class Clone:
    """In the place of the norm at `path` stands a copy of the layer at `into`, with tensors of its own."""

    path: str
    into: str


@dataclass(frozen=True)
class Container:
    """`members` move into a fusecli.nn container called `cls` that stands at `path`, the first of them.

    Tensor names follow: member number i lives below `path.i`, as in torch.ao.
    """

    path: str
    cls: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Remainder:
    """The norm at `path` was folded into `into`; its submodules `members` stay, in that order."""

    path: str
    into: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Opaque:
    """What the custom fuser called `fuser` made of `members` stands at `path`.

    `result` is that module where it is at hand; replaying the edit needs the fuser's code, and consent.
    """

    path: str
    members: tuple[str, ...]
    fuser: str
    result: nn.Module | None = field(default=None, compare=False, repr=False)


Edit = (
    Own | Bordered | Clone | Plain | Resize | Bias | Identity | Passed | Zero | Container | Remainder | Opaque
)


@dataclass(frozen=True, eq=False)
class Rewrite:
    """New tensors by their state-dict key *before* the edits, and the edits in the order they are done."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()

    def __add__(self, other: Rewrite) -> Rewrite:
        """This rewrite, then the other one."""
        return Rewrite({**self.tensors, **other.tensors}, self.edits + other.edits)
