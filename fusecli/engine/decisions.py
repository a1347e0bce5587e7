"""What the engine exchanges: groups, what the user taught, decisions and the plan they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fusecli.errors import NotFoldable
from fusecli.graph.kinds import kind_of
from fusecli.outcome import Evidence, Mode, Refusal
from fusecli.proof.region import Region
from fusecli.rewrite import Rewrite

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Group:
    """Names to fuse, where they were written, and what the spec says that no module or tensor can.

    rules  the rules that may be used for it; None: all
    """

    modules: tuple[str, ...]
    where: str = ""
    hints: Mapping[str, Any] = field(default_factory=dict)
    rules: frozenset[str] | None = None


@dataclass(frozen=True)
class Member:
    """A module of a group, its path and its kind (fusecli.graph.kinds)."""

    path: str
    module: nn.Module
    kind: str


@dataclass(frozen=True)
class CustomFuser:
    """A user's function for one exact sequence of classes, called as (is_qat, *modules), as by torch.ao."""

    sequence: tuple[type, ...]
    name: str
    function: Callable[..., Any]


@dataclass(frozen=True)
class Vocabulary:
    """What the user taught the tool, custom fusers and classes to be treated as another one; and what it may
    do.

    rules        the names of the rules that may be used; None: all
    restructure  whether a layer may become one of another class, where only that is exact
    clone        whether a layer may be stored several times, where several norms want it
    mode         what is made: a folded model, or one that is trained with simulated quantization
    same_path    whether every input goes through the modules that ran
    """

    fusers: tuple[CustomFuser, ...] = ()
    treat: Mapping[type, type] = field(default_factory=dict)
    rules: frozenset[str] | None = None
    restructure: bool = False
    clone: bool = False
    mode: Mode = "folded"
    same_path: bool = False

    def kind(self, module: nn.Module) -> str:
        return kind_of(module, self.treat.get(type(module)))

    def may_use(self, group: Group) -> frozenset[str] | None:
        """The rules for one group; None: all."""
        if self.rules is None or group.rules is None:
            return self.rules if group.rules is None else group.rules
        return self.rules & group.rules

    def fuser(self, modules: Sequence[nn.Module]) -> CustomFuser | None:
        """The user's fuser for exactly these classes; it goes before any rule."""
        types = tuple(type(module) for module in modules)
        return next((custom for custom in self.fusers if custom.sequence == types), None)


@dataclass(frozen=True)
class Decision:
    """How one group is fused: `members` take part in the rule, `kept` stay where they are.

    custom    a user's fuser does it, and has to be given real tensors
    probe     proves members whose class is not known, where the group is no chain; raises NotFoldable
    shown     members of an unknown class that need no probe: the run has shown what they do
    evidence  whether a recorded run has shown the group, or the list was believed
    region    the part of the run that the group is; None where nothing was recorded
    left_out    members that were asked for and stay, with the reason
    caveats   what the recorded sizes could not show
    leaving   the members that become an identity: they will give the memory that they take
    unrun     modules beside the members that no input has run: the fold holds for inputs that do not either
    """

    group: Group
    rule: str
    rewrite: Callable[[Modules], Rewrite] = field(compare=False, repr=False)
    members: tuple[str, ...]
    kept: tuple[str, ...] = ()
    custom: bool = False
    probe: Callable[[Modules], None] | None = field(default=None, compare=False, repr=False)
    shown: frozenset[str] = frozenset()
    evidence: Evidence = Evidence.CLAIMED
    region: Region | None = None
    left_out: tuple[Refusal, ...] = ()
    caveats: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    unrun: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Decisions, in the order of the run where one was recorded; `done` are the groups that are fused
    already."""

    decisions: tuple[Decision, ...] = ()
    refused: tuple[Refusal, ...] = ()
    done: tuple[Group, ...] = ()


def rules_in(names: str) -> frozenset[str]:
    """The rules of a decision, whose names are joined by "+"."""
    return frozenset(names.split("+"))


def refusal(group: Group, no: NotFoldable, rule: str | None = None) -> Refusal:
    evidence = (*no.evidence, group.where) if group.where else no.evidence
    return Refusal(group.modules, no.code, no.reason, rule, evidence, no.remedy)
