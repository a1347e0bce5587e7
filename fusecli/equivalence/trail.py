"""The trail of a run: every floating tensor that a model computes outside its groups, as a few numbers.

An output may be blind (an argmax, a saturated sigmoid) where each group is right by itself and the whole is
not, because something reads a tensor inside a group. That shows in the first tensor computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusecli.equivalence.compare import LARGE, LEFT_OVER, Difference

Step = tuple[str, tuple[int, ...], float, float]  # name, shape, size of what it was made from, projection


@dataclass(frozen=True)
class Trail:
    """The steps of one run; the n-th step of a model and the n-th of its fold are the same operation.

    way    the name of every operation, those inside of groups too
    exits  what groups have given: the module that gave it, and in which of its calls
    """

    steps: list[Step]
    way: list[str] = field(default_factory=list)
    exits: dict[tuple[str, int], Step] = field(default_factory=dict)

    def exits_against(self, other: Trail) -> Difference:
        """The group whose output differs most in the other run: it shows what a dead head behind it hides."""
        both = [key for key in self.exits if key in other.exits]
        mine, theirs = (Trail([trail.exits[key] for key in both]) for trail in (self, other))
        worst = mine.against(theirs)
        return worst if not worst.error else Difference(worst.error, f"a group's output, {worst.where}")

    def against(self, other: Trail) -> Difference:
        """The step that differs most in the other run.

        Where a run goes another way (a forward that asks for the class of a module), what comes after is not
        compared: then the outputs have to tell.
        """
        worst, largest = Difference(), 0.0
        for number, (mine, theirs) in enumerate(zip(self.steps, other.steps, strict=False)):
            if mine[:2] != theirs[:2]:
                break
            name, shape, size, projection = mine
            where = f"step {number + 1} ({name})"
            if math.isfinite(size):
                largest = max(largest, min(size, LARGE))
            if math.isnan(size) or size == theirs[2] == math.inf:
                continue  # no numbers of the original to be held against, as behind the filling of a mask
            if not math.isfinite(size) or not math.isfinite(theirs[2]):
                worst = worst.worse(Difference(math.inf, where, "NaN or Inf in one of the two runs"))
            elif projection != theirs[3]:
                scale = max(size, theirs[2], LEFT_OVER * largest) * math.sqrt(math.prod(shape))
                worst = worst.worse(Difference(abs(projection - theirs[3]) / scale, where))
        return worst


@dataclass(frozen=True)
class End:
    """Where a group begins or ends: a module, and which of its calls; None: each of them."""

    path: str
    turn: int | None = None


@contextmanager
def followed(
    model: nn.Module, groups: Sequence[tuple[End, End]], exits: Sequence[End] = ()
) -> Iterator[Trail]:
    """Inside, every operation of the running `model` is noted, save those between the call that begins a
    group and the return that ends it: what is there may have another value once the group is fused. What the
    calls in `exits` return has the same one again, and is noted too."""
    within = [0]
    handles = []

    def step(by: int, turn: int | None) -> Callable[..., None]:
        calls = count()

        def hook(*_: Any) -> None:
            if next(calls) == turn or turn is None:
                within[0] += by

        return hook

    for end in dict.fromkeys(first for first, _ in groups):
        handles.append(
            model.get_submodule(end.path).register_forward_pre_hook(step(1, end.turn), prepend=True)
        )
    for end in dict.fromkeys(last for _, last in groups):  # several groups may share a norm
        handles.append(model.get_submodule(end.path).register_forward_hook(step(-1, end.turn)))
    trail = Trail([])
    for end in dict.fromkeys(exits):
        hook = _leaving(trail, end)
        handles.append(model.get_submodule(end.path).register_forward_hook(hook))
    try:
        with _Noting(trail, within):
            yield trail
    finally:
        for handle in handles:
            handle.remove()


def _leaving(trail: Trail, end: End) -> Callable[..., None]:
    calls = count()

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        turn = next(calls)
        if end.turn is not None and end.turn != turn:
            return
        with torch._C.DisableTorchFunction():  # to look at it is no step of the model
            for tensor in _tensors(output):
                step = (end.path, tuple(tensor.shape), _size(tensor), _projection(tensor))
                trail.exits[end.path, turn] = step

    return hook


class _Noting(TorchFunctionMode):
    def __init__(self, trail: Trail, within: list[int]) -> None:
        super().__init__()
        self._way, self._steps, self._within = trail.way, trail.steps, within

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        sources = [] if self._within[0] else [_size(value) for value in _tensors((args, kwargs))]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple | list):
            self._way.append(getattr(func, "__name__", ""))
        if not self._within[0]:
            for tensor in _tensors(result):
                size = _largest([_size(tensor), *sources])
                self._steps.append(
                    (getattr(func, "__name__", ""), tuple(tensor.shape), size, _projection(tensor))
                )
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        # What vmap and grad wrap has no numbers of its own, a nested tensor has no shape.
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
        odd = wrapped or value.is_nested or value.layout is not torch.strided
        if not odd and value.dtype is torch.float64 and value.numel():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _size(tensor: Tensor) -> float:
    """The largest magnitude: where large numbers cancel, what is left has the rounding of the large ones."""
    least, most = torch.aminmax(tensor.detach())
    return max(abs(float(least)), abs(float(most)))


def _largest(sizes: Sequence[float]) -> float:
    """NaN where one of them is, which `max` sees only if it comes first."""
    return math.nan if any(map(math.isnan, sizes)) else max(sizes)


def _projection(tensor: Tensor) -> float:
    """The sum of all elements, each with a weight of its own: tensors that differ hardly share it."""
    flat = tensor.detach().reshape(-1)
    weights = (
        torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device).mul_(math.sqrt(2)).frac_()
    )
    return float((flat * weights.sub_(0.5)).sum())
