"""What a recorded run left behind: values, the op calls that made and read them, the modules they ran in.

A value is one view of one storage between two writes to it: an in-place op makes a new one. Nothing here
holds a tensor. What is dead (no output of the model, no memory that outlives the run depends on it) reads
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fusecli.graph.held import Hold
from fusecli.graph.ops import MOVES


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor among the arguments of a call: the number of its value."""

    value: int


@dataclass(frozen=True, slots=True)
class Value:
    """made_by   the call that made it; None: it was there before the run
    name      of the parameter, buffer or input that it is; "" for what the run made
    constant  whether it derives from what the model holds and from literals alone
    origins   names of the parameters and buffers that a constant derives from
    storage   the number of the storage that it is in
    """

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    made_by: int | None
    name: str = ""
    constant: bool = False
    origins: frozenset[str] = frozenset()
    storage: int = -1


@dataclass(frozen=True, slots=True)
class Call:
    """One op call; `op` is None for what is no op: a reader outside of torch, an output, memory that is kept.

    visits   the module calls it ran in, outermost first
    lends    whether it hands the memory to something outside of torch, to be read and written at any time
    """

    number: int
    op: Any
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    visits: tuple[int, ...]
    lends: bool = False

    @property
    def shapes(self) -> bool:
        """Whether the shape of its result depends on numbers: then Python reads them in the shape."""
        return torch.Tag.dynamic_output_shape in getattr(self.op, "tags", ())

    @property
    def writes(self) -> bool:
        """Whether it changes memory that was there before."""
        schema = getattr(self.op, "_schema", None)
        return schema is not None and bool(schema.is_mutable)

    def argument(self, position: int) -> int | None:
        """The value that is the positional argument `position`; None if that is no tensor."""
        found = self.args[position] if position < len(self.args) else None
        return found.value if isinstance(found, Ref) else None


@dataclass(frozen=True, slots=True)
class Visit:
    """One call of one module: `path` is its first name, `parent` the call of a module that it happened in,
    `plain` whether it was given one tensor and nothing else, `calls` the range of the op calls inside."""

    number: int
    path: str
    parent: int | None
    plain: bool
    takes: tuple[int, ...]
    gives: tuple[int, ...]
    calls: range


@dataclass(frozen=True)
class Touches:
    """Who reads and who writes each storage, in the order of the run. `lasting`: those that were there before
    the run, and so are read after it."""

    reads: Mapping[int, list[Call]]
    writes: Mapping[int, list[Call]]
    lasting: frozenset[int]


@dataclass(frozen=True)
class Recording:
    """One run.

    names       every name of a module by its first one
    written     parameters and buffers that forward wrote to
    aliases     names that are the same memory, as lists of parameters and buffers
    appeared    values that no op of the run has made, nor anybody before it
    elsewhere   modules that another thread has called, with the number of op calls when they returned
    held        modules that something outside of the module tree holds too: a call that comes from there is
                no call of the module
    places      for the calls that ask for numbers, the line of somebody's code that does
    by_size     the lines on which the forward of a module that ran decides by sizes
    """

    values: tuple[Value, ...]
    calls: tuple[Call, ...]
    visits: tuple[Visit, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    written: frozenset[str] = frozenset()
    aliases: tuple[frozenset[str], ...] = ()
    appeared: frozenset[int] = frozenset()
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, Hold] = field(default_factory=dict)
    places: Mapping[int, str] = field(default_factory=dict)
    by_size: tuple[str, ...] = ()

    def held_by(self, path: str) -> Hold | None:
        """What holds the module at `path`; or the function that holds one around it, in which case a copy of
        the model calls the original."""
        around = (path[:end] for end, letter in enumerate(path) if letter == ".")
        functions = (hold for name in ("", *around) if (hold := self.held.get(name)) and hold.function)
        return self.held.get(path) or next(functions, None)

    @cached_property
    def first_name(self) -> dict[str, str]:
        return {name: first for first, names in self.names.items() for name in names}

    @cached_property
    def _visits_by_path(self) -> dict[str, list[Visit]]:
        found: dict[str, list[Visit]] = {}
        for visit in self.visits:
            found.setdefault(visit.path, []).append(visit)
        return found

    def visits_of(self, path: str) -> list[Visit]:
        """The calls of the module that is known as `path`, under whichever name it was called."""
        return self._visits_by_path.get(self.first_name.get(path, path), [])

    def tensors_of(self, path: str) -> list[Value]:
        """The parameters and buffers of a module, as they were before the run."""
        return self._tensors_by_owner.get(path, [])

    @cached_property
    def _tensors_by_owner(self) -> dict[str, list[Value]]:
        found: dict[str, list[Value]] = {}
        for name, value in self._named.items():
            found.setdefault(name.rpartition(".")[0], []).append(value)
        return found

    @cached_property
    def _visits_by_parent(self) -> dict[int | None, list[Visit]]:
        found: dict[int | None, list[Visit]] = {}
        for visit in self.visits:
            found.setdefault(visit.parent, []).append(visit)
        return found

    def visits_in(self, visit: Visit) -> list[Visit]:
        """The module calls that were made directly in `visit`."""
        return self._visits_by_parent.get(visit.number, [])

    @cached_property
    def turns(self) -> tuple[int, ...]:
        """For each visit, how many calls of the same module came before it."""
        counts: Counter[str] = Counter()
        turns = []
        for visit in self.visits:
            turns.append(counts[visit.path])
            counts[visit.path] += 1
        return tuple(turns)

    def maker(self, value: int) -> Call | None:
        number = self.values[value].made_by
        return None if number is None else self.calls[number]

    @cached_property
    def alive(self) -> tuple[bool, ...]:
        """For each call, whether anything that lasts depends on it. So does a write to memory that is there:
        once a norm is an identity, its output is that memory."""
        needed = [False] * len(self.values)
        alive = [False] * len(self.calls)
        for call in reversed(self.calls):
            lasting = not call.makes or call.op is None or call.writes or call.shapes
            if lasting or any(needed[value] for value in call.makes):
                alive[call.number] = True
                for value in call.reads:
                    needed[value] = True
        return tuple(alive)

    @cached_property
    def unseen_until(self) -> int:
        """The op call up to which ops may have run that nobody has recorded; -1 if there were none.

        What they read cannot be told: whatever was there until their results turned up.
        """
        seen = [self._readers[value][0].number for value in self.appeared if self._readers[value]]
        return max((*seen, *self.elsewhere.values()), default=-1)

    @cached_property
    def touches(self) -> Touches:
        reads: dict[int, list[Call]] = {}
        writes: dict[int, list[Call]] = {}
        for call in self.calls:
            read = {self.values[value].storage for value in call.reads}
            for storage in read if self.alive[call.number] else ():
                reads.setdefault(storage, []).append(call)
            made = {self.values[value].storage for value in call.makes}
            for storage in read if call.lends else read & made if _writes(call) else ():
                writes.setdefault(storage, []).append(call)
        before = frozenset(value.storage for value in self.values if value.made_by is None)
        return Touches(reads, writes, before)

    @cached_property
    def asked(self) -> tuple[str, ...]:
        """Where forward has looked at numbers that flow: for others it may go another way."""
        looks = [
            call
            for call in self.calls
            if call.number in self.places and not all(self.values[value].constant for value in call.reads)
        ]
        return tuple(dict.fromkeys(map(self._asking, looks)))

    def _asking(self, call: Call) -> str:
        """The module and the line of code: 'gate (net.py:12 in Gate.forward)'."""
        where, line = self.inside(call) or "the model's forward", self.places[call.number]
        return f"{where} ({line})" if line else where

    @cached_property
    def steps(self) -> int:
        """How many op calls compute something from what flows, and something depends on them."""
        return self.steps_in(range(len(self.calls)))

    def steps_in(self, calls: Iterable[int]) -> int:
        """How many of these do."""
        return sum(
            self.alive[call.number]
            and callable(call.op)
            and call.name not in MOVES
            and not all(self.values[value].constant for value in call.makes)
            for call in map(self.calls.__getitem__, calls)
        )

    @cached_property
    def _readers(self) -> list[list[Call]]:
        readers: list[list[Call]] = [[] for _ in self.values]
        for call in self.calls:
            for value in dict.fromkeys(call.reads):
                readers[value].append(call)
        return readers

    def reading(self, value: int) -> list[Call]:
        """The calls that read it, whether anything depends on them or not."""
        return self._readers[value]

    def readers(self, value: int) -> list[Call]:
        """The calls that read it, in the order of the run."""
        return self.living(self._readers[value])

    def living(self, calls: Iterable[Call]) -> list[Call]:
        """Those that something depends on; all of them where nothing depends on any."""
        found = list(calls)
        return [call for call in found if self.alive[call.number]] or found

    def named(self, name: str) -> Value | None:
        """The parameter or buffer called `name`, or called so among other names, as it was before the run."""
        return self._named.get(name)

    @cached_property
    def _named(self) -> dict[str, Value]:
        own = {value.name: value for value in self.values if value.name and value.made_by is None}
        shared = {
            other: own[name] for names in self.aliases for name in names if name in own for other in names
        }
        return shared | own

    def inside(self, call: Call) -> str:
        """The module that `call` ran in; "" for the model's own forward."""
        return self.visits[call.visits[-1]].path if call.visits else ""

    def described(self, call: Call) -> str:
        """For evidence: what it is and where it ran."""
        if call.op is None:
            return call.name
        place = self.inside(call)
        return f"{call.name} in {place}" if place else f"{call.name} in the model's forward"


def _writes(call: Call) -> bool:
    return call.writes or (call.op is None and bool(call.makes))


def described(recording: Recording, calls: Iterable[Call]) -> tuple[str, ...]:
    """The calls for evidence, each once."""
    return tuple(dict.fromkeys(recording.described(call) for call in calls))
