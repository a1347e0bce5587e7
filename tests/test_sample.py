"""Arguments and outputs in whatever classes people put them."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fusecli.sample import Sample, cast, mapped, tensors_in

A, B = torch.tensor([1.0, 2.0]), torch.tensor([3.0])


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


class Checked(Pair):
    """A named tuple that looks at what it gets."""

    def __new__(cls, a: Tensor, b: Tensor) -> Checked:
        assert a.ndim == b.ndim == 1
        made = super().__new__(cls, a, b)
        made.first = a
        return made


class Other(tuple):
    """A tuple whose constructor takes something else than its items."""

    def __new__(cls, a: Tensor, *, b: Tensor) -> Other:
        return super().__new__(cls, (a, b))


class Boxes(list):
    def __init__(self, *, a: Tensor, b: Tensor) -> None:
        super().__init__([a, b])
        self.size = (4, 4)


@dataclasses.dataclass(frozen=True)
class Batch:
    a: Tensor
    b: Tensor
    rows: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        assert self.a.dtype is torch.float32
        object.__setattr__(self, "rows", len(self.a))


@dataclasses.dataclass(slots=True)
class Slotted:
    a: Tensor
    b: Tensor


@dataclasses.dataclass
class Output(OrderedDict):
    """As transformers has it: a dict that is a dataclass too, with each entry as an attribute."""

    a: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        for name in ("a", "b"):
            super().__setitem__(name, getattr(self, name))

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("an output is not written to")


class Frozen(Mapping[str, Tensor]):
    def __init__(self, **items: Tensor) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Tensor:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def by_default() -> Any:
    made: Any = defaultdict(list)
    made.update(a=A, b=B)
    return made


CONTAINERS: dict[str, Any] = {
    "named": Pair(A, B),
    "checked": Checked(A, B),
    "subclass": Other(A, b=B),
    "list_subclass": Boxes(a=A, b=B),
    "post_init": Batch(A, B),
    "slots": Slotted(A, B),
    "ordered": OrderedDict(a=A, b=B),
    "default": by_default(),
    "user_dict": UserDict(a=A, b=B),
    "model_output": Output(A, B),
    "structseq": torch.return_types.max((A, B)),
    "nested": {"x": [Checked(A, B)]},
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_a_container_is_walked_and_made_anew_in_its_own_class(case: str) -> None:
    value = CONTAINERS[case]
    assert [tensor is known for tensor, known in zip(tensors_in(value), (A, B), strict=True)] == [True] * 2
    wide = cast(value, torch.float64)
    assert type(wide) is type(value)
    assert wide is not value
    assert [tensor.dtype for tensor in tensors_in(wide)] == [torch.float64] * 2
    assert [tensor.dtype for tensor in tensors_in(value)] == [torch.float32] * 2
    seen: list[Tensor] = []
    mapped(value, lambda tensor: seen.append(tensor) or tensor)
    assert [id(tensor) for tensor in seen] == [id(tensor) for tensor in tensors_in(value)]


def test_attributes_beside_the_items_stay() -> None:
    assert cast(CONTAINERS["list_subclass"], None).size == (4, 4)
    assert cast(CONTAINERS["default"], None)["new"] == []
    assert cast(CONTAINERS["post_init"], torch.float64).rows == 2
    wide = cast(CONTAINERS["checked"], torch.float64)
    assert wide.first is wide.a
    wide = cast(CONTAINERS["model_output"], torch.float64)
    assert wide.a is wide["a"]


def test_a_packed_sequence_is_one_argument() -> None:
    packed = pack_sequence([A, B])
    sample = Sample.of(packed).copy(torch.float64)
    (wide,) = sample.args
    assert isinstance(wide, PackedSequence)
    assert wide.data.dtype is torch.float64
    assert wide.batch_sizes.dtype is torch.int64


def test_what_cannot_be_made_anew_is_passed_on_whole() -> None:
    value = Frozen(a=A, b=B)
    assert cast(value, torch.float64) is value
    assert [tensor is known for tensor, known in zip(tensors_in(value), (A, B), strict=True)] == [True] * 2


def test_what_holds_itself_is_walked_once() -> None:
    loop: list[Any] = [A]
    loop.append(loop)
    assert len(tensors_in(loop)) == 1
    assert cast(loop, torch.float64)[0].dtype is torch.float64
