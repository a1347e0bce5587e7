"""The arguments of one forward call, and the conditions a call is repeated under: fresh tensors, one seed."""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Sample:
    """The arguments of one forward call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Any) -> Sample:
        """A tensor is the only argument, a tuple or list are the arguments in order, a dict is by keyword. A
        PackedSequence, which is a tuple by its class, is one argument."""
        if isinstance(inputs, Sample):
            return inputs
        if isinstance(inputs, Mapping):
            return cls(kwargs=dict(inputs))
        several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)
        return cls(tuple(inputs) if several else (inputs,))

    def copy(self, dtype: torch.dtype | None = None) -> Sample:
        """Fresh tensors, the floating ones in `dtype`: a forward may write to its input."""
        return Sample(cast(self.args, dtype), cast(dict(self.kwargs), dtype))

    def mapped(self, leaf: Callable[[Tensor], Tensor]) -> Sample:
        """The same arguments with `leaf(tensor)` for each tensor."""
        return Sample(mapped(self.args, leaf), mapped(dict(self.kwargs), leaf))


def mapped(value: Any, leaf: Callable[[Tensor], Any]) -> Any:
    """`value` with `leaf(tensor)` for each tensor in it: containers made anew, of the same class.

    No constructor is called but those of tuple, list and dict themselves: one of somebody else's class may
    look at what it is given, or take other arguments. What cannot be made anew is passed on whole.
    """
    return _mapped(value, leaf, ())


def _mapped(value: Any, leaf: Callable[[Tensor], Any], around: tuple[Any, ...]) -> Any:
    if isinstance(value, Tensor):
        return leaf(value)
    items = _items(value, around)
    if items is None:
        return value
    fresh = [(key, _mapped(item, leaf, (*around, value))) for key, item in items]
    try:
        return _remade(value, fresh)
    except Exception:  # whatever a class does when it is copied
        return value


def _items(value: Any, around: tuple[Any, ...] = ()) -> list[tuple[Any, Any]] | None:
    """What tensors may be in, in order, each with the key, index or field that it is under. None: it is no
    container, does not show what is in it, or is one of those `around` it."""
    if any(value is outer for outer in around):
        return None
    try:
        return _entries(value)
    except Exception:  # whatever a class does when it is asked
        return None


def _entries(value: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return list(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [entry.name for entry in dataclasses.fields(value)]
        return [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    return None


def _remade(value: Any, items: Sequence[tuple[Any, Any]]) -> Any:
    """A container of the class of `value` that holds these items instead."""
    cls: Any = type(value)
    if cls in (tuple, list, dict):
        return cls(items) if cls is dict else cls(item for _, item in items)
    if isinstance(value, tuple) and hasattr(cls, "n_sequence_fields"):  # what torch.max and the like return
        return cls(item for _, item in items)
    if isinstance(value, tuple):
        return _with_attributes(tuple.__new__(cls, (item for _, item in items)), value, items)
    if isinstance(value, list):
        fresh = list.__new__(cls)
        list.extend(fresh, (item for _, item in items))
        return _with_attributes(fresh, value, items)
    if isinstance(value, dict):
        return _dict_remade(value, items)
    fresh = copy.copy(value)
    for key, item in items:
        if isinstance(value, Mapping):
            fresh[key] = item
        else:
            object.__setattr__(fresh, key, item)
    return fresh


def _dict_remade(value: dict[Any, Any], items: Sequence[tuple[Any, Any]]) -> Any:
    cls: Any = type(value)
    base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
    try:
        fresh = copy.copy(value)  # keeps what else a class holds, such as the factory of a defaultdict
    except Exception:
        fresh = cls.__new__(cls)
    for key, item in items:
        base.__setitem__(fresh, key, item)
    return _with_attributes(fresh, value, items)


def _with_attributes(fresh: Any, value: Any, items: Sequence[tuple[Any, Any]]) -> Any:
    """`fresh` with the attributes of `value`; those that are one of its items are the new one."""
    held = _items(value) or []
    instead = {id(old): new for (_, old), (_, new) in zip(held, items, strict=True)}
    if hasattr(value, "__dict__"):
        vars(fresh).update({name: instead.get(id(old), old) for name, old in vars(value).items()})
    return fresh


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A copy of `value` and its tensors, the floating ones in `dtype` (None: kept)."""

    def fresh(tensor: Tensor) -> Tensor:
        clone = tensor.detach().clone()
        return clone.to(dtype) if dtype and tensor.is_floating_point() else clone

    return mapped(value, fresh)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside `value`, in the order in which `mapped` comes to them."""
    return list(_tensors(value, ()))


def _tensors(value: Any, around: tuple[Any, ...]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    for _, item in _items(value, around) or ():
        yield from _tensors(item, (*around, value))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the random numbers of torch on the CPU, of Python and of numpy start from `seed`."""
    numpy = sys.modules.get("numpy")
    python, legacy = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the accelerators too
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(legacy)


def random_state() -> tuple[Any, ...]:
    """The state of the generators that `seeded` controls, to be compared."""
    numpy = sys.modules.get("numpy")
    legacy = [str(part) for part in numpy.random.get_state()] if numpy else []
    with torch._C.DisableTorchFunction():  # to look at it is no step of a model
        return torch.default_generator.get_state().tolist(), random.getstate(), legacy
