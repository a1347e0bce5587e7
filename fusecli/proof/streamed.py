"""Models that are larger than the memory: parameters are fetched when an op reads them.

In their places stand tensors of the meta device, of the dtype that the model is to compute in. An op that is
given one gets its numbers instead; those that were used last are kept, as far as there is room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusecli.graph.followers import LeftBehind, following
from fusecli.nn.duplicate import duplicate

Fetch = Callable[[], Tensor]
ROOM = 128 * 2**20  # bytes


class Kept:
    """The tensors that were used last, as far as there is room."""

    def __init__(self, room: int = ROOM) -> None:
        self._room, self._bytes = room, 0
        self._tensors: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable) -> Tensor | None:
        found = self._tensors.get(key)
        if found is not None:
            self._tensors.move_to_end(key)
        return found

    def put(self, key: Hashable, tensor: Tensor) -> Tensor:
        """Keeps `tensor`, and forgets what was not used for the longest time."""
        old = self._tensors.pop(key, None)
        self._bytes += tensor.nbytes - (old.nbytes if old is not None else 0)
        while self._tensors and self._bytes > self._room:
            self._bytes -= self._tensors.popitem(last=False)[1].nbytes
        self._tensors[key] = tensor
        return tensor


class Weights(TorchFunctionMode):
    """Inside, ops that are given one of these placeholders compute with its numbers."""

    def __init__(self, places: Mapping[int, tuple[Tensor, Fetch]], kept: Kept) -> None:
        super().__init__()
        self._places, self._kept = places, kept

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ABOUT:
            return (
                torch.device("cpu")
                if func == _DEVICE and id(args[0]) in self._places
                else func(*args, **kwargs or {})
            )
        return func(*map(self._real, args), **{key: self._real(v) for key, v in (kwargs or {}).items()})

    def _real(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._fetched(value) if id(value) in self._places else value
        if type(value) in (tuple, list):
            found = [self._real(item) for item in value]
            return type(value)(found) if any(a is not b for a, b in zip(found, value, strict=True)) else value
        return value

    def _fetched(self, place: Tensor) -> Tensor:
        # The place itself: its id may be another's once it is gone.
        known = self._kept.get(place)
        if known is not None:
            return known
        with torch._C.DisableTorchFunction():
            return self._kept.put(place, self._places[id(place)][1]().to(place.dtype))


_DEVICE = Tensor.device.__get__
_PROPERTIES = (
    *("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_leaf"),
    *("is_sparse", "is_quantized", "is_nested"),
)
_METHODS = ("size", "dim", "numel", "is_floating_point", "is_complex", "element_size", "__hash__")
# What is asked about a tensor without its numbers.
_ABOUT = frozenset(getattr(Tensor, name).__get__ for name in _PROPERTIES)
_ABOUT |= {getattr(Tensor, name) for name in _METHODS}


def streamed(model: nn.Module, tensors: Mapping[str, Fetch], *, kept: Kept) -> tuple[nn.Module, Weights]:
    """A float64 copy of `model` without the numbers of its parameters, and what brings them: those of
    `tensors` by name, else the model's own."""
    places: dict[int, tuple[Tensor, Fetch]] = {}
    instead: dict[int, object] = {}
    scripted = {
        id(p) for m in model.modules() if isinstance(m, torch.jit.ScriptModule) for p in m.parameters()
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in scripted or not _plain(parameter):
            continue
        empty = torch.empty(parameter.shape, dtype=torch.float64, device="meta")
        place = nn.Parameter(empty, parameter.requires_grad)
        fetch = tensors.get(name) or _own(parameter)
        places[id(place)] = place, fetch
        instead[id(parameter)] = place
    twin = duplicate(model, instead)
    # What stays in its own dtype has the right numbers all the same.
    with suppress(LeftBehind), following(twin):
        twin.double()
    give_exact(twin.named_buffers(), tensors)
    return twin, Weights(places, kept)


def give_exact(named: Iterable[tuple[str, Tensor]], exact: Mapping[str, Fetch]) -> None:
    """Writes exact values into the tensors that have some."""
    for name, tensor in named:
        if name in exact and (value := exact[name]()).shape == tensor.shape:
            tensor.data.copy_(value)


def _own(parameter: nn.Parameter) -> Fetch:
    return parameter.detach


def _plain(parameter: nn.Parameter) -> bool:
    plain = type(parameter) is nn.Parameter and parameter.layout is torch.strided
    return plain and parameter.is_floating_point() and not parameter.is_nested
