"""Groups that are no chain: calls of modules and the recorded ops between them, run again by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.equivalence.compare import Incomparable
from fusecli.graph.dataflow import Call, Recording, Visit
from fusecli.graph.ops import AVERAGES, JOINS, MOVES, SELECTIONS, SUMS
from fusecli.graph.replay import Replay
from fusecli.sample import Sample, tensors_in

Modules = Mapping[str, nn.Module]
_PART = MOVES | SELECTIONS
_LINEAR = _PART | JOINS | AVERAGES | SUMS


@dataclass
class Region:
    """The part of a recorded run that some modules make up.

    members    their paths
    enclosing  those of them that others are in: of their forward only some ops belong to it
    inline     the calls of these ops
    """

    recording: Recording
    members: tuple[str, ...]
    inline: frozenset[int] = frozenset()
    enclosing: frozenset[str] = frozenset()
    _random: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def visits(self) -> tuple[Visit, ...]:
        """The calls of members, in the order of the run; none inside of another."""
        own = [
            v for path in self.members if path not in self.enclosing for v in self.recording.visits_of(path)
        ]
        return tuple(sorted(own, key=lambda visit: visit.number))

    @property
    def watched(self) -> Iterator[str]:
        """The paths whose calls have to be seen."""
        return (path for path in self.members if path not in self.enclosing)

    @cached_property
    def order(self) -> tuple[tuple[str, int], ...]:
        """The calls of members as path and turn, in the order of the run."""
        return tuple((self._path(visit), self.recording.turns[visit.number]) for visit in self.visits)

    @cached_property
    def begins_in(self) -> tuple[str, int]:
        """The module, and which of its calls, up to which everything has its old value: the first member, or
        what is around an op of a member's own before it."""
        ahead = [call for call in self.calls if call.number < self.visits[0].calls.start]
        return self._around(ahead[0]) if ahead else self.order[0]

    @cached_property
    def ends_in(self) -> tuple[str, int]:
        """The module, and which of its calls, after whose return everything has its old value: the last
        member, or what is around the last op behind it."""
        last = self.visits[-1]
        behind = [call for call in self.calls if call.number >= last.calls.stop]
        return self._around(behind[-1]) if behind else self.order[-1]

    def _around(self, call: Call) -> tuple[str, int]:
        visit = self.recording.visits[call.visits[-1] if call.visits else 0]
        return visit.path, self.recording.turns[visit.number]

    @cached_property
    def _within(self) -> frozenset[int]:
        return frozenset(number for visit in self.visits for number in visit.calls)

    @cached_property
    def _made(self) -> frozenset[int]:
        """Values that members give, or ops of their own, or that follow from them by ops that the fold may
        cross."""
        made = {value for visit in self.visits for value in visit.gives}
        made.update(value for number in self.inline for value in self.recording.calls[number].makes)
        for call in self.recording.calls:
            crosses = call.name in _LINEAR or call.number in self.inline
            if crosses and call.number not in self._within and made & set(call.reads):
                made.update(call.makes)
        return frozenset(made)

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The ops between members, and those that join what several of them give."""
        recording, wanted = self.recording, {value for visit in self.visits for value in visit.takes}
        chosen: set[int] = set()
        for call in reversed(recording.calls):
            if call.number in self._within or not self._made & set(call.makes) or call.op is None:
                continue
            if call.number not in self.inline and call.name not in _LINEAR:
                continue
            joins = call.name in SUMS and len(self._made & set(call.reads)) > 1
            if joins or call.number in self.inline or wanted & set(call.makes):
                chosen.add(call.number)
                wanted.update(self._made & set(call.reads))
        # What else takes a part of an inner value: that part is compared, not the whole.
        for call in recording.calls:
            if call.name in _PART and call.number not in self._within and wanted & set(call.reads):
                chosen.add(call.number)
                wanted.update(call.makes)
        return tuple(recording.calls[number] for number in sorted(chosen))

    @cached_property
    def exits(self) -> tuple[int, ...]:
        """What is read outside."""
        inside = {call.number for call in self.calls} | self._within
        made = [v for visit in self.visits for v in visit.gives] + [
            v for call in self.calls for v in call.makes
        ]
        read = (
            v for v in dict.fromkeys(made) if any(c.number not in inside for c in self.recording.readers(v))
        )
        return tuple(read)

    @cached_property
    def leaves_in(self) -> tuple[tuple[str, int], ...]:
        """The calls of members that give what is read outside, as path and turn."""
        exits = set(self.exits)
        calls = zip(self.visits, self.order, strict=True)
        return tuple(call for visit, call in calls if exits & set(visit.gives))

    @cached_property
    def unknown(self) -> tuple[int, ...]:
        """What ops between members read besides: no call of a member shows it."""
        shown = {v for visit in self.visits for v in (*visit.takes, *visit.gives)}
        shown |= {v for call in self.calls for v in call.makes}
        read = (v for call in self.calls for v in call.reads if not self.recording.values[v].constant)
        return tuple(value for value in dict.fromkeys(read) if value not in shown)

    def of(self, modules: Modules, inputs: Sequence[Sample]) -> tuple[Tensor, ...]:
        """What the region gives, with these modules in it."""
        replay = self._replay(modules)
        steps: list[Visit | Call] = sorted((*self.visits, *self.calls), key=_when)
        turn = 0
        given = {v for visit in self.visits for v in visit.gives} | {v for c in self.calls for v in c.makes}
        for visit, sample in zip(self.visits, inputs, strict=True):
            for value, tensor in zip(visit.takes, _tensors(sample), strict=False):
                if value not in given:
                    replay.known.setdefault(value, tensor)
        self._draw(replay, inputs)
        for step in steps:
            if isinstance(step, Call):
                replay.at(step.makes[0])
                continue
            sample, turn = inputs[turn], turn + 1
            outputs = self._called(modules, step, sample, replay)
            replay.known.update(zip(step.gives, outputs, strict=False))
        return tuple(replay.at(value) for value in self.exits)

    def shown(self, modules: Modules, inputs: Sequence[Sample], outputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """What the region gave in a run: the members' own outputs, and what the ops behind them make of
        them."""
        if self.unknown:
            return self.of(modules, inputs)
        replay = self._replay(modules)
        for visit, sample, output in zip(self.visits, inputs, outputs, strict=True):
            for value, tensor in zip(visit.takes, _tensors(sample), strict=False):
                replay.known.setdefault(value, tensor)
            replay.known.update(zip(visit.gives, _tensors(output), strict=False))
        return tuple(replay.at(value) for value in self.exits)

    def _called(self, modules: Modules, visit: Visit, sample: Sample, replay: Replay) -> Sequence[Tensor]:
        """What a member gives when it is called as it was, but for what the region itself has made."""
        takes = iter(visit.takes)

        def given(tensor: Tensor) -> Tensor:
            value = next(takes, None)
            return replay.known[value].clone() if value in replay.known else tensor

        sample = sample.mapped(given)
        return _tensors(modules[self._path(visit)](*sample.args, **sample.kwargs))

    def _path(self, visit: Visit) -> str:
        names = set(self.recording.names.get(visit.path, (visit.path,)))
        return next(path for path in self.members if path in names)

    def _draw(self, replay: Replay, inputs: Sequence[Sample]) -> None:
        """Random numbers for what nobody has seen: the region has to be right for any."""
        dtype = next((t.dtype for s in inputs for t in _tensors(s) if t.is_floating_point()), torch.float64)
        generator = torch.Generator().manual_seed(0)
        for value in self.unknown:
            shape = self.recording.values[value].shape
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            replay.known[value] = self._random.setdefault(value, drawn).to(dtype)

    def _replay(self, modules: Modules) -> Replay:
        def named(name: str) -> Tensor:
            path, _, attribute = name.rpartition(".")
            tensor = getattr(modules.get(path), attribute, None)
            if not isinstance(tensor, Tensor):
                raise Incomparable(f"{name} is read between the members")
            return tensor.detach()

        return Replay(self.recording, named)


def _when(step: Visit | Call) -> int:
    return step.calls.start if isinstance(step, Visit) else step.number


def _tensors(value: Any) -> list[Tensor]:
    found = (value.args, dict(value.kwargs)) if isinstance(value, Sample) else value
    return list(tensors_in(found))
