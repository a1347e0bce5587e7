from __future__ import annotations

import pytest
import torch
from torch import nn

from fusecli.algebra import pack, unpack
from fusecli.errors import NotFoldable
from tests.algebra.grid import CASES, Case, each


@each(CASES)
def test_round_trip_is_a_view_of_the_storage(case: Case) -> None:
    module = case.module
    groups, transposed = getattr(module, "groups", 1), getattr(module, "transposed", False)
    weight = unpack(module.weight, groups, transposed)
    i = getattr(module, "in_channels", None) or module.in_features
    o = getattr(module, "out_channels", None) or module.out_features
    assert weight.shape[:3] == (groups, o // groups, i // groups)
    packed = pack(weight, transposed)
    assert torch.equal(packed, module.weight)
    assert packed.data_ptr() == weight.data_ptr() == module.weight.data_ptr()


def test_axes_are_where_the_equations_look_for_them() -> None:
    conv, up = nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2)
    # Output channel 4 is output 1 of group 1; input channel 3 is input 1 of group 1.
    assert torch.equal(unpack(conv.weight, 2, False)[1, 1, 1], conv.weight[4, 1])
    assert torch.equal(unpack(up.weight, 2, True)[1, 1, 1], up.weight[3, 1])


def test_channels_last_is_split_and_joined_without_a_copy() -> None:
    storage = nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last).weight
    packed = pack(unpack(storage, 2, False), False)
    assert packed.data_ptr() == storage.data_ptr()
    assert packed.stride() == storage.stride()


def test_a_weight_in_another_memory_order_is_copied_right() -> None:
    weight = torch.randn(2, 3, 4, 5)
    assert torch.equal(unpack(pack(weight, True), 2, True), weight)


@pytest.mark.parametrize(("shape", "groups"), [((6, 2, 3), 4), ((6,), 1), ((6, 2), 0)])
def test_a_storage_that_does_not_split_is_refused(shape: tuple[int, ...], groups: int) -> None:
    with pytest.raises(NotFoldable) as refusal:
        unpack(torch.ones(shape), groups, False)
    assert refusal.value.code == "shape"
