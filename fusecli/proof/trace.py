"""The trace of a run: every floating tensor that a model computes outside its groups, as a few numbers.

An output may be blind (an argmax, a saturated sigmoid) where each group is right by itself and the whole is
not, because something reads a tensor inside a group. That shows in the first tensor computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusecli.proof.compare import LARGE, LEFT_OVER, Difference

Step = tuple[str, tuple[int, ...], float, float]  # name, shape, size of what it was made from, projection


@dataclass(frozen=True)
class Trace:
    """The steps of one run; the n-th step of a model and the n-th of its fold are the same operation.

    way    the name of every operation, those inside of groups too
    exits  what groups have given: the module that gave it, and in which of its calls
    """

    steps: list[Step]
    way: list[str] = field(default_factory=list)
    exits: dict[tuple[str, int], Step] = field(default_factory=dict)

    def exits_against(self, other: Trace) -> Difference:
        """The group whose output differs most in the other run: it shows what a dead head behind it hides."""
        both = [key for key in self.exits if key in other.exits]
        mine, theirs = (Trace([trace.exits[key] for key in both]) for trace in (self, other))
        worst = mine.against(theirs)
        return worst if not worst.error else Difference(worst.error, f"a group's output, {worst.where}")

    def against(self, other: Trace) -> Difference:
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
) -> Iterator[Trace]:
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
    trace = Trace([])
    for end in dict.fromkeys(exits):
        hook = _leaving(trace, end)
        handles.append(model.get_submodule(end.path).register_forward_hook(hook))
    try:
        with _Noting(trace, within):
            yield trace
    finally:
        for handle in handles:
            handle.remove()


def _leaving(trace: Trace, end: End) -> Callable[..., None]:
    calls = count()

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        turn = next(calls)
        if end.turn is not None and end.turn != turn:
            return
        with torch._C.DisableTorchFunction():  # to look at it is no step of the model
            for tensor in _tensors(output):
                step = (end.path, tuple(tensor.shape), _size(tensor), _projection(tensor))
                trace.exits[end.path, turn] = step

    return hook


class _Noting(TorchFunctionMode):
    def __init__(self, trace: Trace, within: list[int]) -> None:
        super().__init__()
        self._way, self._steps, self._within = trace.way, trace.steps, within

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        looked = not self._within[0] and name not in _VIEWS
        sources = [_size(value) for value in _tensors((args, kwargs)) if not _weight(value)] if looked else []
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple | list):
            self._way.append(name)
        if looked:
            for tensor in _tensors(result):
                size = _largest([_size(tensor), *sources])
                self._steps.append((name, tuple(tensor.shape), size, _projection(tensor)))
        return result


# The same numbers in another shape: whoever reads them is looked at.
_VIEWS = frozenset(
    ("view", "reshape", "flatten", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "detach")
)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        # What vmap and grad wrap has no numbers of its own, a nested tensor has no shape.
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
        odd = wrapped or value.is_nested or value.layout is not torch.strided
        if not odd and value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _weight(value: Tensor) -> bool:
    """Whether it is a matrix of the model: what is summed has the size of the other factor and the bias."""
    return isinstance(value, nn.Parameter) and value.ndim > 1


def _size(tensor: Tensor) -> float:
    """The largest magnitude: where large numbers cancel, what is left has the rounding of the large ones."""
    with torch._C.DisableTorchFunction():
        placeholder = tensor.is_meta
    # A parameter that stands on the meta device has its numbers from a mode around.
    with nullcontext() if placeholder else torch._C.DisableTorchFunction():
        least, most = torch.aminmax(tensor.detach())
        return max(abs(float(least)), abs(float(most)))


def _largest(sizes: Sequence[float]) -> float:
    """NaN where one of them is, which `max` sees only if it comes first."""
    return math.nan if any(map(math.isnan, sizes)) else max(sizes)


def _projection(tensor: Tensor) -> float:
    """The sum of all elements, each with a weight of its own: tensors that differ hardly share it."""
    with torch._C.DisableTorchFunction():
        flat = tensor.detach().reshape(-1)
        rows, rest = divmod(flat.numel(), _WIDTH)
        weights = _weights(max(rows, _WIDTH)).to(flat.device, flat.dtype)
        found = flat[rows * _WIDTH :].dot(weights[:rest])
        if rows:
            found = found + flat[: rows * _WIDTH].view(rows, _WIDTH).mv(weights[:_WIDTH]).dot(weights[:rows])
        return float(found)


_WIDTH = 1021  # a prime: no axis of a tensor comes back in step with it


@cache
def _weights(count: int) -> Tensor:
    """Between -0.5 and 0.5."""
    return torch.arange(1, count + 1, dtype=torch.float64).mul_(math.sqrt(2)).frac_().sub_(0.5)
