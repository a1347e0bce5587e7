"""Tensors that a model holds a second time, or looks at through a view, when it is given others.

`load_state_dict` copies in place, so whatever looks at a tensor's memory sees the new numbers. A loaded
tensor that is put in the place of the old one (no copy, and the dtype of the file) reaches nobody else.
Whether there is anybody else needs no search: the old memory outlives its place.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.weak import TensorWeakRef

from fusecli.graph.materialise import duplicate
from fusecli.graph.memory import expired, key_of
from fusecli.nn.duplicate import tensors_held


class LeftBehind(Exception):
    """Something that looks at a tensor's memory cannot be given the new numbers; says why, and what helps."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.remedy = remedy


@contextmanager
def following(model: nn.Module, joined: Collection[str] = ()) -> Iterator[None]:
    """Inside, other tensors may be put in the places of parameters and buffers of `model`; whatever else held
    the old ones, or looks at their memory, has the new numbers afterwards.

    joined  names that share memory and go on to: their memory has the numbers of the last of them

    Raises LeftBehind where something cannot follow.
    """
    memories = _watched(model, joined)
    yield
    held = [memory for memory in memories if memory.is_held and memory.moved]
    if any(memory.changes_dtype or memory.changes_device for memory in held):
        gc.collect()  # what only a cycle holds that nobody can reach is not looked at
        held = [memory for memory in held if memory.is_held]
    visible = _visible({memory.key for memory in held if memory.changes_dtype})
    for memory in held:
        memory.follow(visible.get(memory.key, []), model)


def widened(model: nn.Module) -> nn.Module:
    """A copy in float64 that shares nothing with `model`; its tensors share what those of `model` share."""
    twin = duplicate(model)
    try:
        with following(twin):
            twin.double()
    except LeftBehind:
        pass  # what stays in its own dtype has the right numbers all the same
    return twin


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the model stood, and how it looked at its memory."""

    module: nn.Module
    attribute: str
    name: str
    old: TensorWeakRef
    dtype: torch.dtype
    device: torch.device
    layout: tuple[int, tuple[int, ...], tuple[int, ...]]
    wants_grad: bool | None  # None: a buffer

    @property
    def now(self) -> Tensor | None:
        held: Any = self.module._buffers if self.wants_grad is None else self.module._parameters
        return held.get(self.attribute)  # type: ignore[no-any-return]

    def restore(self, storage: Any, dtype: torch.dtype) -> None:
        """Puts the old tensor back, or one like it if it is gone."""
        old = self.old()
        if old is None:
            old = _view(storage, dtype, self.layout)
            old = old if self.wants_grad is None else nn.Parameter(old, self.wants_grad)
        setattr(self.module, self.attribute, old)  # as load_state_dict does: a class may want to know


@dataclass
class _Memory:
    """One storage: the places that stood on it, and a watch on its life, which `kept` prolongs."""

    key: Any
    watch: Any
    places: list[_Place] = field(default_factory=list)
    kept: Tensor | None = None

    @property
    def is_held(self) -> bool:
        return self.kept is not None or not expired(self.watch)

    @property
    def moved(self) -> list[tuple[_Place, Tensor]]:
        """The places that look at another memory now, with what stands there."""
        found = ((place, place.now) for place in self.places)
        return [(place, now) for place, now in found if now is not None and key_of(now)[0] != self.key]

    @property
    def changes_dtype(self) -> bool:
        return any(now.dtype != place.dtype for place, now in self.moved)

    @property
    def changes_device(self) -> bool:
        return any(now.device != place.device for place, now in self.moved)

    def follow(self, visible: list[Tensor], model: nn.Module) -> None:
        """Gives the numbers that stand in the places to everybody who looks at this memory."""
        moved = self.moved
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self.key)
        for place, now in moved:
            if now.device != storage.device:
                what = f"{place.name} is on {storage.device}, and the model keeps it{self._also(model)} too"
                raise LeftBehind(what, "build the model where it will run, not under torch.device('meta')")
        dtype = moved[0][1].dtype
        if self.changes_dtype:
            storage = self._converted(moved, storage, visible, model)
        for place, now in moved:
            _view(storage, now.dtype, place.layout).copy_(now)
        for place, _ in moved:
            place.restore(storage, dtype)

    def _converted(
        self, moved: list[tuple[_Place, Tensor]], storage: Any, visible: list[Tensor], model: nn.Module
    ) -> Any:
        """This memory in the new dtype, with everybody who looked at the old one."""
        before = {place.dtype for place in self.places} | {tensor.dtype for tensor in visible}
        after = {now.dtype for _, now in moved}
        if len(before) > 1 or len(after) > 1 or not storage.resizable():  # numpy does not let go of it
            place, now = next((place, now) for place, now in moved if place.dtype != now.dtype)
            what = f"{place.name} is loaded as {now.dtype}, and the model keeps it{self._also(model)} too, "
            what += f"as {place.dtype}"
            raise LeftBehind(what, f"let the factory return the model in {now.dtype}")
        (old,), (new,) = before, after
        whole = _view(storage, old, (0, (storage.nbytes() // old.itemsize,), (1,))).to(new)
        wide: Any = whole.untyped_storage()
        for tensor in visible:
            layout = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
            tensor.data = _view(wide, new, layout)
        return wide

    def _also(self, model: nn.Module) -> str:
        """Where else a module of the model has this memory, as far as its attributes show it."""
        for path, module in model.named_modules():
            for name, tensor in tensors_held(module):
                if not name.startswith("_") and key_of(tensor)[0] == self.key:
                    return f" in {path}.{name}" if path else f" in {name}"
        return " elsewhere"


def _watched(model: nn.Module, joined: Collection[str]) -> list[_Memory]:
    memories: dict[Any, _Memory] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for attribute, tensor in held.items():
                if tensor is None or is_lazy(tensor) or tensor.layout is not torch.strided:
                    continue
                key, watch = key_of(tensor)
                name = f"{path}.{attribute}" if path else attribute
                memory = memories.setdefault(key, _Memory(key, watch))
                wants_grad = tensor.requires_grad if held is module._parameters else None
                layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
                old = TensorWeakRef(tensor)
                place = _Place(module, attribute, name, old, tensor.dtype, tensor.device, layout, wants_grad)
                memory.places.append(place)
                if name in joined:
                    memory.kept = tensor.detach()
    return list(memories.values())


def _view(storage: Any, dtype: torch.dtype, layout: tuple[int, tuple[int, ...], tuple[int, ...]]) -> Tensor:
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, *layout)


def _visible(keys: set[Any]) -> dict[Any, list[Tensor]]:
    """Every tensor of the process on these memories, whoever holds it: also closures, and files' globals."""
    found: dict[Any, list[Tensor]] = {}
    for each in gc.get_objects() if keys else ():
        # Not isinstance: some objects answer for their class with code of their own.
        if issubclass(type(each), Tensor) and not is_lazy(each) and (key := key_of(each)[0]) in keys:
            found.setdefault(key, []).append(each)
    return found
