"""Is one group still the same function? Judged on what really flows into its first and out of its last."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fusecli.equivalence.compare import TOLERANCE, Difference, Incomparable, compare, floating_error
from fusecli.equivalence.noise import dtype_of, tolerance
from fusecli.equivalence.run import float64_arithmetic
from fusecli.outcome import Judgement
from fusecli.sample import Sample, cast

Observer = Callable[[int, Sample, Any], None]
_PERTURBATION = 0.01


@dataclass
class GroupCheck:
    """What was seen of one group, call by call. `exact` and `fused` are its modules after the fold, in
    float64 and in the stored dtype, to be run in a row."""

    members: tuple[str, ...]
    exact: Sequence[nn.Module]
    fused: Sequence[nn.Module]
    calls: int = 0
    order: int | None = None
    difference: Difference = field(default_factory=Difference)
    noticed: float = 0.0
    drift: float | None = None
    noise_floor: float | None = None
    trouble: str = ""
    undefined: bool = False
    misstored: bool = False
    _perturbed: list[nn.Module] = field(default_factory=list, repr=False)

    @torch.no_grad()  # the forward around may have enabled gradients
    def semantic(self, inputs: Sample, observed: Any) -> None:
        """Float64: the fused group on the input of the first member, against the output of the last."""
        self.calls += 1
        with float64_arithmetic():
            difference = _against(observed, self.exact, inputs)
            if difference.undefined:
                self.undefined = True
                return
            self.difference = self.difference.worse(difference)
            if self.noticed <= TOLERANCE:
                self.noticed = max(self.noticed, _against(observed, self._noisy(), inputs).error)

    @torch.no_grad()
    def stored(self, inputs: Sample, observed: Any) -> None:
        """Stored dtype: the errors of both groups against float64 on the very same input."""
        with float64_arithmetic():
            reference = _chain(self.exact, inputs.copy(torch.float64))
        noise, drift = floating_error(reference, observed), _against(reference, self.fused, inputs).error
        self.noise_floor = max(self.noise_floor or 0.0, noise or 0.0)
        self.drift = max(self.drift or 0.0, drift)

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

    def _noisy(self) -> Sequence[nn.Module]:
        """The fused modules with weights off by 1 %: a check that does not notice them proves nothing."""
        if not self._perturbed:
            generator = torch.Generator().manual_seed(0)
            self._perturbed = [copy.deepcopy(module) for module in self.exact]
            parameters = [
                p for module in self._perturbed for p in module.parameters() if p.is_floating_point()
            ]
            buffers = [b for module in self._perturbed for b in module.buffers() if b.is_floating_point()]
            weights = [p for p in parameters if p.ndim > 1] or parameters or buffers
            for weight in weights:
                factor = torch.rand(weight.shape, generator=generator, dtype=weight.dtype)
                weight.data.mul_(1 + _PERTURBATION * (0.5 + 0.5 * factor))
        return self._perturbed


def _against(observed: Any, modules: Sequence[nn.Module], inputs: Sample) -> Difference:
    try:
        return compare(observed, _chain(modules, inputs.copy()))
    except Incomparable:
        raise
    except Exception as error:  # whatever a forward may raise on an input that does not fit it
        return Difference(math.inf, "", f"the fused group raises {type(error).__name__}: {error}")


def _chain(modules: Sequence[nn.Module], inputs: Sample) -> Any:
    output = modules[0](*inputs.args, **inputs.kwargs)
    for module in modules[1:]:
        output = module(output)
    return output


@contextmanager
def observed(model: nn.Module, groups: Sequence[tuple[str, ...]], tell: Observer) -> Iterator[list[str]]:
    """Inside, every pass through a group of the running `model` is told: `tell(group, input, output)`.

    The n-th call of the first member belongs to the n-th call of the last. Yields a list with one entry per
    group; after the run it says what was wrong with the calls ("" if nothing was).
    """
    trouble = [""] * len(groups)
    waiting: list[deque[Sample]] = [deque() for _ in groups]
    handles = []
    for number, group in enumerate(groups):
        first, last = model.get_submodule(group[0]), model.get_submodule(group[-1])
        # Before the user's own pre-hooks: they run again where the group is run by itself.
        enter = _enter(waiting[number])
        handles.append(first.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        handles.append(last.register_forward_hook(_leave(number, group, waiting[number], trouble, tell)))
    try:
        yield trouble
    finally:
        for handle in handles:
            handle.remove()
        for number, (group, left) in enumerate(zip(groups, waiting, strict=True)):
            if left and not trouble[number]:
                trouble[number] = f"{group[0]} ran {len(left)} times more often than {group[-1]}"


def _enter(waiting: deque[Sample]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waiting.append(Sample(args, kwargs).copy())

    return hook


def _leave(
    number: int, group: tuple[str, ...], waiting: deque[Sample], trouble: list[str], tell: Observer
) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if waiting:
            tell(number, waiting.popleft(), cast(output, None))
        else:
            trouble[number] = f"{group[-1]} ran before {group[0]}"

    return hook
