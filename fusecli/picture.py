"""A picture of a recorded run as plain values: what is drawn, and not where."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Role(str, Enum):
    """What a node stands for. A move hands on every element; an end is an input, an output or a reader
    outside of torch."""

    MODULE = "module"
    OP = "op"
    MOVE = "move"
    END = "end"


class Fate(str, Enum):
    """What a plan does with a node: a norm is left, any other module or op may be no part of a group."""

    FUSED = "fused"
    LEFT = "left"
    OTHER = "other"


@dataclass(frozen=True)
class Node:
    """One call of a module or of an op.

    kind    the class of a module; where an op ran
    call    which call of its module it is, if there are several
    note    the rule of a group, the reason code of a norm that is left
    reason  the sentence for people that goes with a reason code
    group   the number of the group that it belongs to
    shape   of what it gives
    above, below  names of what it reads from, and of what reads it, that is not drawn
    """

    name: str
    kind: str
    role: Role
    call: str = ""
    fate: Fate = Fate.OTHER
    note: str = ""
    reason: str = ""
    group: int | None = None
    shape: tuple[int, ...] | None = None
    above: tuple[str, ...] = ()
    below: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """Nodes in the order of the run. An edge leads from a node to a later one that reads it, by number."""

    title: str
    nodes: tuple[Node, ...] = ()
    edges: tuple[tuple[int, int], ...] = ()
