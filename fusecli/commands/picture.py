"""What stands around the norms of a recorded run, and what became of each: the picture of a plan.

A user whose model does not fold sees here what stands between the layer and its norm, or who else reads the
layer's output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fusecli.engine import Decision
from fusecli.errors import Problem, UsageError
from fusecli.graph.dataflow import Call, Recording
from fusecli.graph.ops import MOVES, SELECTIONS
from fusecli.outcome import Unfused
from fusecli.picture import Fate, Node, Picture, Role
from fusecli.pipeline.select import Selection
from fusecli.spec.names import NameTree
from fusecli.spec.wording import shown

HOPS = 2


def check_around(around: Iterable[str], names: Sequence[str]) -> None:
    """Raises UsageError with every name in `around` that no module has."""
    tree = NameTree(names)
    unknown = [name for name in around if name not in tree]
    found = [(name, tree.nearest(name)) for name in unknown]
    if found:
        raise UsageError(
            *(
                Problem(
                    f"no module is named {shown(name)}",
                    "--graph-around",
                    f"did you mean {shown(near)}?" if near else "give the name of a module",
                )
                for name, near in found
            )
        )


def picture_of(
    title: str,
    selection: Selection,
    decisions: Sequence[Decision],
    unfused: Iterable[Unfused],
    around: Sequence[str] = (),
) -> Picture:
    """What is within two hops of every norm, or of the modules that `around` names."""
    assert selection.run is not None
    plan = _Plan(selection.run.recording, selection, decisions, tuple(unfused))
    graph = _Graph(plan.recording, plan.whole)
    centres = list(graph.centres(plan, around))
    near = sorted(graph.near(centres))
    number = {step: at for at, step in enumerate(near)}
    return Picture(
        title,
        tuple(graph.node(step, plan, number) for step in near),
        tuple((number[a], number[b]) for a, b in graph.edges if a in number and b in number),
    )


@dataclass
class _Plan:
    """What was decided, by the first name of each module."""

    recording: Recording
    selection: Selection
    decisions: Sequence[Decision]
    unfused: Sequence[Unfused]

    def first(self, path: str) -> str:
        return self.recording.first_name.get(path, path)

    @cached_property
    def norms(self) -> list[str]:
        return list(dict.fromkeys(map(self.first, self.selection.norms)))

    @cached_property
    def groups(self) -> dict[str, int]:
        """The members of groups, with the number of the group."""
        return {self.first(p): n for n, made in enumerate(self.decisions) for p in made.group.modules}

    @cached_property
    def left(self) -> dict[tuple[str, str], Unfused]:
        """By module, and by the op where no norm module computes it."""
        return {(self.first(u.module), u.kind if u.functional else ""): u for u in self.unfused}

    @property
    def whole(self) -> set[str]:
        """The modules that are one node each, whatever is inside."""
        return {*self.norms, *self.groups}

    def left_at(self, step: _Step) -> Unfused | None:
        if step.role is Role.MODULE and (found := self.left.get((step.path, ""))):
            return found
        if step.path in self.groups:
            return None
        places = (
            (self.recording.inside(call) or "(the model)", f"function {call.name.partition('.')[2]}")
            for call in step.calls
        )
        return next((self.left[place] for place in places if place in self.left), None)


@dataclass
class _Step:
    """One node to be: a call of a module, an op call outside of those, an input.

    path   the module, or the one that the op ran in
    """

    path: str
    name: str
    role: Role
    visit: int | None = None
    calls: list[Call] = field(default_factory=list)
    shape: tuple[int, ...] | None = None


class _Graph:
    """The run with every leaf module as one step. A step comes after those that it reads from."""

    def __init__(self, recording: Recording, whole: Collection[str]) -> None:
        self.recording = recording
        self.whole = whole
        self.steps: list[_Step] = []
        self.edges: dict[tuple[int, int], None] = {}
        self._makers: dict[int, int] = {}  # the step behind each value
        self._visits: dict[int, int] = {}
        calls = [call for call in recording.calls if self._flows(call)]
        read = {value for call in calls for value in call.reads}
        for value in recording.values:
            if value.made_by is None and not value.constant and value.number in read:
                self._makers[value.number] = len(self.steps)
                name = value.name or "data from outside of the run"
                self.steps.append(_Step("", name, Role.END, shape=value.shape))
        for call in calls:
            self._add(call)

    def _flows(self, call: Call) -> bool:
        """Whether something depends on it, and it works on more than weights or is what the picture is
        about."""
        values, visits = self.recording.values, self.recording.visits
        constant = call.makes and all(values[value].constant for value in call.makes)
        ours = any(visits[visit].path in self.whole for visit in call.visits)
        return self.recording.alive[call.number] and (ours or not constant)

    def _add(self, call: Call) -> None:
        at = self._step_of(call)
        step = self.steps[at]
        step.calls.append(call)
        last = (*call.makes, *call.reads)[:1]
        step.shape = self.recording.values[last[0]].shape if last else None
        for value in call.reads:
            maker = self._makers.get(value, at)
            if maker != at:
                self.edges[maker, at] = None
        self._makers |= dict.fromkeys(call.makes, at)

    def _step_of(self, call: Call) -> int:
        visit = next((number for number in call.visits if self._one(number)), None)
        if visit is not None and visit in self._visits:
            return self._visits[visit]
        if visit is not None:
            self._visits[visit] = len(self.steps)
            path = self.recording.visits[visit].path
            self.steps.append(_Step(path, path, Role.MODULE, visit))
        else:
            moves = Role.MOVE if call.name in MOVES | SELECTIONS else Role.OP
            role = Role.END if call.op is None else moves
            self.steps.append(_Step(self.recording.inside(call), call.name.removeprefix("aten."), role))
        return len(self.steps) - 1

    def _one(self, number: int) -> bool:
        """Whether this call of a module is one node."""
        visit = self.recording.visits[number]
        return bool(visit.path) and (visit.path in self.whole or not self.recording.visits_in(visit))

    def centres(self, plan: _Plan, around: Sequence[str]) -> Iterator[int]:
        """The steps that the picture is drawn around; a module that has none gets one, and stands alone."""
        if not around:
            yield from (at for at, step in enumerate(self.steps) if plan.left_at(step))
        for name in map(plan.first, around) if around else plan.norms:
            found = [at for at, step in enumerate(self.steps) if _belongs(step, name)]
            if not found:
                found = [len(self.steps)]
                self.steps.append(_Step(name, name, Role.MODULE))
            yield from found

    @cached_property
    def _next(self) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        above: dict[int, list[int]] = {}
        below: dict[int, list[int]] = {}
        for maker, reader in self.edges:
            above.setdefault(reader, []).append(maker)
            below.setdefault(maker, []).append(reader)
        return above, below

    def near(self, centres: Iterable[int]) -> set[int]:
        """What is at most two hops away, up or down; a move is no hop, so that it hides nobody."""
        distance = dict.fromkeys(centres, 0)
        waiting = deque(distance)
        above, below = self._next
        while waiting:
            at = waiting.popleft()
            for other in (*above.get(at, ()), *below.get(at, ())):
                hop = int(self.steps[other].role is not Role.MOVE)
                if distance[at] + hop < distance.get(other, HOPS + 1):
                    distance[other] = distance[at] + hop
                    (waiting.append if hop else waiting.appendleft)(other)
        return set(distance)

    def node(self, at: int, plan: _Plan, drawn: Collection[int]) -> Node:
        step = self.steps[at]
        left = plan.left_at(step)
        group = plan.groups.get(step.path) if step.role is Role.MODULE and left is None else None
        fate, note = (Fate.LEFT, left.code) if left else (Fate.OTHER, "")
        if group is not None:
            fate, note = Fate.FUSED, plan.decisions[group].rule
        above, below = (
            tuple(dict.fromkeys(self.steps[other].name for other in side.get(at, ()) if other not in drawn))
            for side in self._next
        )
        return Node(
            step.name,
            self._kind(step, plan),
            step.role,
            self._turn(step),
            fate,
            note,
            left.reason if left else "",
            group,
            step.shape,
            above,
            below,
        )

    def _kind(self, step: _Step, plan: _Plan) -> str:
        if step.role is Role.MODULE:
            return type(plan.selection.modules.get(step.path)).__name__
        return f"in {step.path}" if step.path and step.role is not Role.END else ""

    def _turn(self, step: _Step) -> str:
        if step.visit is None:
            return "no part of this run" if step.role is Role.MODULE else ""
        calls = len(self.recording.visits_of(step.path))
        return f"call {self.recording.turns[step.visit] + 1} of {calls}" if calls > 1 else ""


def _belongs(step: _Step, name: str) -> bool:
    """Whether it is a call of the module called `name`, happens inside of it, or has it inside."""
    inside = f"{step.path}.".startswith(f"{name}.")
    return inside or (step.role is Role.MODULE and name.startswith(f"{step.path}."))
