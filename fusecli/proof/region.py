"""What a fold changes of a run: calls of modules and the recorded ops between them, run again by themselves.

A region is a function of what flows into it. It is asked with random numbers of the recorded shapes, smaller
where nothing in it depends on sizes: they see an error in any weight, whatever one input happens to excite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.graph.dataflow import Call, Recording, Visit
from fusecli.graph.ops import AVERAGES, JOINS, MOVES, SELECTIONS, SUMS
from fusecli.graph.replay import Replay
from fusecli.proof.compare import Incomparable
from fusecli.sample import Sample, tensors_in

Modules = Mapping[str, nn.Module]
Turn = tuple[str, int]  # a module and which of its calls, counted from 0
_PART = MOVES | SELECTIONS
_LINEAR = _PART | JOINS | AVERAGES | SUMS
# Ops between members that are the same at every size.
_SIZE_FREE = SUMS | JOINS | {f"aten.{name}" for name in ("relu", "relu_", "mul", "mul_", "detach", "clone")}


@dataclass(frozen=True)
class Inputs:
    """What flows into a region: numbers by value, and whole arguments of calls that are given more than one
    tensor."""

    numbers: Mapping[int, Tensor]
    calls: Mapping[Turn, Sample] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Region:
    """The part of a recorded run that some modules make up.

    members    their paths
    enclosing  those of them that others are in: of their forward only some ops belong to it
    inline     the calls of these ops
    chain      whether nothing behind the last member belongs to it
    turns      the calls of members that belong to it, where other groups have some of their own; else all
    """

    recording: Recording
    members: tuple[str, ...]
    inline: frozenset[int] = frozenset()
    enclosing: frozenset[str] = frozenset()
    chain: bool = False
    turns: Mapping[str, frozenset[int]] = field(default_factory=dict)

    @cached_property
    def visits(self) -> tuple[Visit, ...]:
        """The calls of members, in the order of the run; none inside of another."""
        own = [
            visit
            for path in self.members
            if path not in self.enclosing
            for turn, visit in enumerate(self.recording.visits_of(path))
            if path not in self.turns or turn in self.turns[path]
        ]
        return tuple(sorted(own, key=lambda visit: visit.number))

    @cached_property
    def order(self) -> tuple[Turn, ...]:
        """The calls of members as path and turn, in the order of the run."""
        return tuple((self._path(visit), self.recording.turns[visit.number]) for visit in self.visits)

    @cached_property
    def begins_in(self) -> Turn:
        """The module, and which of its calls, up to which everything has its old value: the first member, or
        what is around an op of a member's own before it."""
        ahead = [call for call in self.calls if call.number < self.visits[0].calls.start]
        return self._around(ahead[0]) if ahead else self.order[0]

    @cached_property
    def ends_in(self) -> Turn:
        """The module, and which of its calls, after whose return everything has its old value: the last
        member, or what is around the last op behind it."""
        last = self.visits[-1]
        behind = [call for call in self.calls if call.number >= last.calls.stop]
        return self._around(behind[-1]) if behind else self.order[-1]

    def _around(self, call: Call) -> Turn:
        visit = self.recording.visits[call.visits[-1] if call.visits else 0]
        return visit.path, self.recording.turns[visit.number]

    @cached_property
    def _within(self) -> frozenset[int]:
        return frozenset(number for visit in self.visits for number in visit.calls)

    @cached_property
    def _given(self) -> frozenset[int]:
        """Values that members give, or ops of their own."""
        given = {value for visit in self.visits for value in visit.gives}
        return frozenset(given | {v for number in self.inline for v in self.recording.calls[number].makes})

    @cached_property
    def _crossed(self) -> dict[int, Call]:
        """The ops that a fold may cross, behind what members give; each is looked at once."""
        last = self.visits[-1].calls.start if self.chain and self.visits else len(self.recording.calls)
        found = {number: self.recording.calls[number] for number in self.inline}
        waiting = list(self._given)
        while waiting:
            for call in self.recording.reading(waiting.pop()):
                linear = call.op is not None and call.name in _LINEAR and call.number < last
                if linear and call.number not in self._within and call.number not in found:
                    found[call.number] = call
                    waiting += call.makes
        return found

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The ops between members, and those that join what several of them give."""
        made = self._given.union(v for call in self._crossed.values() for v in call.makes)
        wanted = {value for visit in self.visits for value in visit.takes}
        chosen: dict[int, Call] = {}
        for number in sorted(self._crossed, reverse=True):
            call = self._crossed[number]
            joins = call.name in SUMS and len(made & set(call.reads)) > 1
            if joins or number in self.inline or wanted & set(call.makes):
                chosen[number] = call
                wanted.update(made & set(call.reads))
        # What else takes a part of an inner value: that part is compared, not the whole.
        waiting = list(wanted)
        while waiting:
            for call in self.recording.reading(waiting.pop()):
                part = call.name in _PART and call.number not in self._within
                if part and call.number not in chosen:
                    chosen[call.number] = call
                    waiting += call.makes
        return tuple(chosen[number] for number in sorted(chosen))

    @cached_property
    def _made(self) -> dict[int, None]:
        # What does nothing gives the very value that it takes.
        given = [value for visit in self.visits for value in visit.gives if value not in visit.takes]
        return dict.fromkeys([*given, *(value for call in self.calls for value in call.makes)])

    @cached_property
    def exits(self) -> tuple[int, ...]:
        """What is read outside, and what members give to nobody."""
        inside = {call.number for call in self.calls} | self._within
        given = dict.fromkeys(value for visit in self.visits for value in visit.gives)

        def leaves(value: int) -> bool:
            readers = self.recording.readers(value)
            return any(call.number not in inside for call in readers) or (not readers and value in given)

        return tuple(filter(leaves, dict.fromkeys([*given, *self._made])))

    @cached_property
    def leaves_in(self) -> tuple[Turn, ...]:
        """The calls of members that give what is read outside, as path and turn."""
        exits = set(self.exits)
        calls = zip(self.visits, self.order, strict=True)
        return tuple(call for visit, call in calls if exits & set(visit.gives))

    @cached_property
    def enters(self) -> tuple[int, ...]:
        """What flows in: the values that members and ops between them read, and nobody here makes."""
        taken = [value for visit in self.visits if visit.plain for value in visit.takes]
        values = self.recording.values
        taken += (v for call in self.calls for v in call.reads if not values[v].constant)
        return tuple(value for value in dict.fromkeys(taken) if value not in self._made)

    @property
    def drawable(self) -> bool:
        """Whether random numbers can stand for what flows in: floating numbers, one tensor for each call."""
        values = (self.recording.values[value] for value in self.enters)
        floating = all(value.dtype.is_floating_point or value.dtype.is_complex for value in values)
        return floating and all(visit.plain and len(visit.gives) == 1 for visit in self.visits)

    def drawn(self, modules: Modules, seed: int, *, small: bool) -> Inputs:
        """Random numbers for what flows in; `small`: of fewer rows and pixels than were recorded."""
        generator = torch.Generator().manual_seed(seed)
        shrunk = _shrinking(modules.values()) if small and self.size_free else None
        numbers = {}
        for number in self.enters:
            value = self.recording.values[number]
            shape = shrunk(value.shape) if shrunk else value.shape
            wide = torch.complex128 if value.dtype.is_complex else torch.float64
            drawn = torch.randn(shape, generator=generator, dtype=wide)
            narrow = value.dtype.is_floating_point or value.dtype.is_complex
            numbers[number] = drawn.to(value.dtype).to(wide) if narrow else drawn
        return Inputs(numbers)

    def seen(self, calls: Mapping[Turn, Sample], seed: int) -> Inputs:
        """What flowed in when the members were called so in a run; random numbers for what no call shows."""
        numbers = dict(self.drawn({}, seed, small=False).numbers)
        for visit, turn in zip(self.visits, self.order, strict=True):
            shown = zip(visit.takes, tensors_in((calls[turn].args, dict(calls[turn].kwargs))), strict=False)
            numbers.update((value, tensor) for value, tensor in shown if value not in self._made)
        return Inputs(numbers, calls)

    def stored(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        """The inputs in the dtypes that they had in the run; arguments that were seen in `dtype`."""
        values = self.recording.values
        numbers = {value: tensor.to(values[value].dtype) for value, tensor in inputs.numbers.items()}
        return Inputs(numbers, {turn: sample.copy(dtype) for turn, sample in inputs.calls.items()})

    @cached_property
    def size_free(self) -> bool:
        """Whether every op between members does the same at each size."""
        return all(call.name in _SIZE_FREE for call in self.calls)

    def of(self, modules: Modules, inputs: Inputs) -> tuple[Tensor, ...]:
        """What the region gives, with these modules in it. Raises Incomparable, LookupError, and whatever a
        module raises."""
        replay = self._replay(modules)
        replay.known.update(inputs.numbers)
        turns = dict(zip((visit.number for visit in self.visits), self.order, strict=True))
        steps: list[Visit | Call] = [*self.visits, *self.calls]
        for step in sorted(steps, key=_when):
            if isinstance(step, Call):
                replay.at(step.makes[0])
                continue
            turn = turns[step.number]
            sample = inputs.calls.get(turn)
            outputs = tensors_in(self._called(modules[turn[0]], step, sample, replay))
            replay.known.update(zip(step.gives, outputs, strict=False))
        return tuple(replay.at(value) for value in self.exits)

    def _called(self, module: nn.Module, visit: Visit, sample: Sample | None, replay: Replay) -> Any:
        """What a member gives when it is called as it was, but for what the region itself has made."""
        if sample is None:
            return module(replay.at(visit.takes[0]).clone())
        takes = iter(visit.takes)

        def given(tensor: Tensor) -> Tensor:
            value = next(takes, None)
            made = value in replay.known
            if not made and value is not None:
                replay.known[value] = tensor
            return replay.known[value].clone() if made and value is not None else tensor.clone()

        sample = sample.mapped(given)
        return module(*sample.args, **sample.kwargs)

    def _path(self, visit: Visit) -> str:
        names = set(self.recording.names.get(visit.path, (visit.path,)))
        return next(path for path in self.members if path in names)

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


_ROWS = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity)


def _shrinking(modules: Iterable[nn.Module]) -> Callable[[tuple[int, ...]], tuple[int, ...]] | None:
    """Smaller shapes that show the same of these modules: every tap of a kernel meets numbers, and what is
    left over when a size is divided by a stride stays. None where nobody knows."""
    found: list[Any] = list(modules)
    kernels: list[Any] = [module for module in found if hasattr(module, "kernel_size")]
    if kernels or any(hasattr(module, "running_mean") for module in found):
        least = max((_span(module) for module in kernels), default=1)

        def pixels(shape: tuple[int, ...]) -> tuple[int, ...]:
            sizes = (size if size < least + 4 else least + (size - least) % 4 for size in shape[2:])
            return (*(min(size, 2) for size in shape[:1]), *shape[1:2], *sizes)

        return pixels
    if all(type(module) in _ROWS for module in found):
        return lambda shape: (*(min(size, 3) for size in shape[:-1]), *shape[-1:])
    return None


def _span(module: Any) -> int:
    """How many pixels a kernel spans, and its stride twice."""

    def numbers(name: str) -> tuple[int, ...]:
        value = getattr(module, name, 1)
        return value if isinstance(value, tuple) else (value,)

    kernel, dilation, stride = map(numbers, ("kernel_size", "dilation", "stride"))
    return max(dilation) * (max(kernel) - 1) + 2 * max(stride) + 1
