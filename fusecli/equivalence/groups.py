"""Is one group still the same function? Judged on what really flows into its first and out of its last."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.equivalence.compare import MOST, Difference, Incomparable, compare, floating_error
from fusecli.equivalence.noise import dtype_of, tolerance
from fusecli.equivalence.power import PERTURBATION, put_off
from fusecli.equivalence.regions import Region
from fusecli.equivalence.run import float64_arithmetic
from fusecli.graph.dataflow import Call
from fusecli.graph.labels import moved
from fusecli.graph.materialise import duplicate
from fusecli.outcome import Judgement
from fusecli.sample import Sample, cast, mapped

Inputs = Sample | Sequence[Sample]  # of a chain those of its first member, of a region those of every call
Observer = Callable[[int, int, Any, Any], None]


@dataclass(frozen=True)
class Pass:
    """One time that data went through a group, as a recorded run has shown it.

    first, last  which calls of its first and its last member, each counted from 0
    bridges      for each link, the recorded ops that move the tensor from one member to the next
    """

    first: int
    last: int
    bridges: tuple[tuple[Call, ...], ...] = ()


Passes = tuple[Pass, ...]
Bridges = tuple[tuple[Call, ...], ...]


@dataclass
class GroupCheck:
    """What was seen of one group, call by call. `exact` and `fused` are its modules after the fold, in
    float64 and in the stored dtype, to be run in a row, with the bridges of `passes` between them; or as
    `region` says, where the group is no chain. `before` are the modules before it, in both dtypes."""

    members: tuple[str, ...]
    exact: Sequence[nn.Module]
    fused: Sequence[nn.Module]
    passes: Passes = ()
    region: Region | None = None
    before: tuple[Sequence[nn.Module], Sequence[nn.Module]] = ((), ())
    calls: int = 0
    order: int | None = None
    difference: Difference = field(default_factory=Difference)
    noticed: float = 0.0
    drift: float | None = None
    noise_floor: float | None = None
    trouble: str = ""
    undefined: bool = False
    misstored: bool = False
    overflown: bool = False
    drawn: bool = False
    _plain: tuple[int, Inputs] | None = field(default=None, repr=False)
    _perturbed: list[nn.Module] = field(default_factory=list, repr=False)

    @torch.no_grad()  # the forward around may have enabled gradients
    def semantic(self, turn: int, inputs: Inputs, observed: Any) -> None:
        """Float64: the fused group on the input of the first member, against the output of the last."""
        self.calls += 1
        with float64_arithmetic():
            observed = self._shown(self.before[0], inputs, observed)
            difference = self._against(observed, self.exact, inputs, turn)
            if difference.undefined:
                self.undefined = True
                return
            self.difference = self.difference.worse(difference)
            if self.noticed <= MOST:  # the tolerance may be raised up to there
                self.noticed = max(self.noticed, self._disturbed(observed, inputs, turn).error)
            if self.noticed <= MOST and self._plain is None:
                self._plain = turn, _copied(inputs)

    @torch.no_grad()
    def on_drawn_input(self, seed: int) -> None:
        """Where what flows in shows no weight, as the zeros that a pruned norm gives: the group before and
        after the fold on random numbers of the same shapes. They are only asked whether it is right."""
        if self.noticed > self.tolerance or self._plain is None or not all(self.before):
            return
        turn, plain = self._plain
        generator = torch.Generator().manual_seed(seed)
        with float64_arithmetic():
            try:
                inputs = _drawn(plain, generator)
                expected = self._result(self.before[0], _copied(inputs), turn)
            except Exception:  # e.g. numbers that the group takes for positions
                return
            difference = self._against(expected, self.exact, inputs, turn)
            if difference.error > self.tolerance:
                return  # another function there: nothing is proven
            self.noticed = self._disturbed(expected, inputs, turn).error
            self.drawn = self.noticed > self.tolerance

    @torch.no_grad()
    def stored(self, turn: int, inputs: Inputs, observed: Any) -> None:
        """Stored dtype: the errors of both groups against float64 on the very same input."""
        observed = self._shown(self.before[1], inputs, observed)
        with float64_arithmetic():
            reference = self._result(self.exact, _copied(inputs, torch.float64), turn)
        noise = floating_error(reference, observed)
        drift = self._against(reference, self.fused, inputs, turn).error
        self.noise_floor = max(self.noise_floor or 0.0, noise or 0.0)
        self.drift = max(self.drift or 0.0, drift)
        # Asked call by call: of another call the original may not be finite either.
        self.overflown |= drift == math.inf and math.isfinite(noise or 0.0)

    @property
    def differs(self) -> bool:
        return bool(self.trouble) or self.difference.error > self.tolerance

    @property
    def tolerance(self) -> float:
        return tolerance(self.noise_floor, dtype_of(self.fused))

    @property
    def judgement(self) -> Judgement:
        if self.differs or self.misstored:
            return Judgement.DIFFERENT
        return Judgement.INCONCLUSIVE if self.why else Judgement.EQUIVALENT

    @property
    def why(self) -> str:
        """One sentence where the judgement is not `equivalent`."""
        if self.trouble:
            return self.trouble
        if self.differs:
            number = f"relative error {self.difference.error:.1e} in float64"
            return self.difference.why or number
        if self.misstored:
            return "its stored tensors do not hold the fold"
        if not self.calls:
            return "the inputs never executed it"
        if self.undefined:
            return "it returns NaN in the original too, which equals nothing"
        if self.noticed <= self.tolerance:
            return "the inputs do not notice weights that are off by 1 %"
        return ""

    def _disturbed(self, observed: Any, inputs: Inputs, turn: int) -> Difference:
        """With weights that are off by 1 %; of what has none, with an output that is."""
        if any(module.state_dict() for module in self.exact):
            return self._against(observed, self._noisy(), inputs, turn)
        return compare(observed, mapped(observed, lambda tensor: tensor * (1 + PERTURBATION)))

    def _shown(self, modules: Sequence[nn.Module], inputs: Inputs, observed: Any) -> Any:
        if self.region is None or isinstance(inputs, Sample):
            return observed
        return self.region.shown(dict(zip(self.members, modules, strict=True)), inputs, observed)

    def _result(self, modules: Sequence[nn.Module], inputs: Inputs, turn: int) -> Any:
        if self.region is not None and not isinstance(inputs, Sample):
            return self.region.of(dict(zip(self.members, modules, strict=True)), inputs)
        assert isinstance(inputs, Sample)
        return _chain(modules, inputs, self._bridges(turn))

    def _against(self, observed: Any, modules: Sequence[nn.Module], inputs: Inputs, turn: int) -> Difference:
        try:
            return compare(observed, self._result(modules, _copied(inputs), turn))
        except (Incomparable, LookupError) as odd:
            raise Incomparable(str(odd)) from odd
        except Exception as error:  # whatever a forward may raise on an input that does not fit it
            return Difference(math.inf, "", f"the fused group raises {type(error).__name__}: {error}")

    def _bridges(self, turn: int) -> Bridges:
        known = next((found for found in self.passes if found.first == turn), None)
        return (known or self.passes[-1]).bridges if self.passes else ()

    def _noisy(self) -> Sequence[nn.Module]:
        """The fused modules with weights off by 1 %: a check that does not notice them proves nothing."""
        if not self._perturbed:
            self._perturbed = [duplicate(module) for module in self.exact]
            put_off(self._perturbed, self.before[0], torch.Generator().manual_seed(0))
        return self._perturbed


def _copied(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return inputs.copy(dtype) if isinstance(inputs, Sample) else [sample.copy(dtype) for sample in inputs]


def _drawn(inputs: Inputs, generator: torch.Generator) -> Inputs:
    def random(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)

    if isinstance(inputs, Sample):
        return inputs.mapped(random)
    return [sample.mapped(random) for sample in inputs]


def _chain(modules: Sequence[nn.Module], inputs: Sample, bridges: Bridges = ()) -> Any:
    output = modules[0](*inputs.args, **inputs.kwargs)
    for number, module in enumerate(modules[1:]):
        for call in bridges[number] if bridges else ():
            output = _across(call, output)
        output = module(output)
    return output


def _across(call: Call, output: Any) -> Any:
    try:
        return moved(call, output)
    except RuntimeError as error:
        raise Incomparable(f"an input has other sizes than the recorded one: {error}") from error


@contextmanager
def observed(
    model: nn.Module,
    groups: Sequence[tuple[str, ...]],
    passes: Sequence[Passes],
    tell: Observer,
    regions: Sequence[Region | None] = (),
) -> Iterator[list[str]]:
    """Inside, every pass through a group of the running `model` is told: `tell(group, turn, input, output)`,
    where `turn` counts the calls of the first member.

    passes   for each group, which call of its first member belongs to which call of its last, as a recorded
             run has shown it; empty: the n-th to the n-th

    Yields a list with one entry per group; after the run it says what was wrong with the calls ("" if nothing
    was).
    """
    shares = Counter(group[-1] for group in groups)
    shapes = regions or [None] * len(groups)
    watches: list[_Watch | _RegionWatch] = [
        _RegionWatch(number, region, tell)
        if region is not None
        else _Watch(
            number,
            group,
            shares[group[-1]] > 1,
            {found.last: found.first for found in pairs} or None,
            tell,
        )
        for number, (group, pairs, region) in enumerate(zip(groups, passes, shapes, strict=True))
    ]
    trouble = [""] * len(groups)
    handles = [handle for watch in watches for handle in watch.hooks(model)]
    try:
        yield trouble
    finally:
        for handle in handles:
            handle.remove()
        trouble[:] = [watch.trouble() for watch in watches]


@dataclass
class _Watch:
    """One group while the model runs: inputs of its first member that wait for the call of its last.

    shared   whether other groups end in the same module
    partner  the call of the first member that each call of the last belongs to, as far as it is known
    """

    number: int
    group: tuple[str, ...]
    shared: bool
    partner: Mapping[int, int] | None
    tell: Observer
    waiting: dict[int, Sample] = field(default_factory=dict)
    entered: int = 0
    left: int = 0
    early: bool = False

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        first, last = model.get_submodule(self.group[0]), model.get_submodule(self.group[-1])
        # Before the user's own pre-hooks: they run again where the group is run by itself.
        yield first.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
        yield last.register_forward_hook(self._leave)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.waiting[self.entered] = Sample(args, kwargs).copy()
        self.entered += 1

    def _leave(self, _: nn.Module, __: Any, output: Any) -> None:
        partner = self._partner(self.left)
        self.left += 1
        if partner is None:
            return  # this call belongs to another group, which shares the norm
        if partner in self.waiting:
            self.tell(self.number, partner, self.waiting.pop(partner), cast(output, None))
        else:
            self.early = True

    def _partner(self, turn: int) -> int | None:
        """Which call of the first member this call of the last belongs to."""
        if self.partner is None:
            return turn
        if not self.shared and turn > max(self.partner):
            # Another input may go round more often than the recorded one: first come, first served.
            return min(self.waiting, default=turn)
        return self.partner.get(turn)

    def trouble(self) -> str:
        if self.early:
            return f"{self.group[-1]} ran before {self.group[0]}"
        if self.waiting:
            return f"{self.group[0]} ran {len(self.waiting)} times more often than {self.group[-1]}"
        return ""


@dataclass
class _RegionWatch:
    """A group that is no chain: what goes into and out of each call of its members, until all were seen."""

    number: int
    region: Region
    tell: Observer
    entered: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    inputs: dict[tuple[str, int], Sample] = field(default_factory=dict)
    outputs: dict[tuple[str, int], Any] = field(default_factory=dict)
    done: bool = False
    telling: bool = False  # the members that are run for that are no calls of the model

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        for path in self.region.watched:
            module = model.get_submodule(path)
            yield module.register_forward_pre_hook(self._entering(path), prepend=True, with_kwargs=True)
            yield module.register_forward_hook(self._leaving(path))

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.telling:
                return
            self.inputs[path, self.entered[path]] = Sample(args, kwargs).copy()
            self.entered[path] += 1

        return enter

    def _leaving(self, path: str) -> Callable[..., None]:
        def leave(_: nn.Module, __: Any, output: Any) -> None:
            if self.telling:
                return
            self.outputs[path, self.left[path]] = cast(output, None)
            self.left[path] += 1
            wanted = self.region.order
            if not self.done and all(call in self.outputs for call in wanted):
                self.done = True
                inputs, outputs = (
                    [self.inputs[call] for call in wanted],
                    [self.outputs[call] for call in wanted],
                )
                self.telling = True
                self.tell(self.number, 0, inputs, outputs)
                self.telling = False

        return leave

    def trouble(self) -> str:
        expected = Counter(path for path, _ in self.region.order)
        if any(self.left.values()) and self.left != expected:
            raise Incomparable("members of a group were called more or less often than in the recorded run")
        return ""
