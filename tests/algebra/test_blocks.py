from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from fusecli.algebra import blocks as module
from fusecli.algebra.blocks import blocks, scaled


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "BLOCK", 24)
    return 24


WEIGHTS = {
    "conv": torch.randn(1, 7, 5, 3, 3),
    "rows beyond a block": torch.randn(1, 2, 30, 3),
    "grouped": torch.randn(3, 4, 5, 3),
    "depthwise": torch.randn(50, 1, 1, 3),
    "transposed": torch.randn(2, 5, 4, 3).transpose(1, 2),
    "channels last": torch.randn(1, 6, 4, 3, 3).permute(0, 1, 4, 2, 3),
    "expanded": torch.randn(1, 1, 1, 3).expand(2, 5, 4, 3),
    "linear": torch.randn(1, 9, 11),
    "empty": torch.empty(1, 0, 4),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_blocks_are_small_and_cover_every_element_once(weight: Tensor, small_blocks: int) -> None:
    visits = torch.zeros(weight.shape)
    for part, counter in blocks(weight, visits):
        assert part.numel() <= small_blocks
        assert part.shape == counter.shape
        counter += 1
    assert torch.equal(visits, torch.ones(weight.shape))


@pytest.mark.parametrize("name", ["conv", "grouped", "depthwise", "transposed", "channels last", "linear"])
def test_each_block_is_one_stretch_of_memory(name: str) -> None:
    for (part,) in blocks(WEIGHTS[name]):
        spanned = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True)) + 1
        assert spanned == prod(part.shape)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("axes", [(0, 1), (0, 2)], ids=["per output", "per input"])
def test_scaled_is_the_product(weight: Tensor, axes: tuple[int, int]) -> None:
    shape = [size if axis in axes else 1 for axis, size in enumerate(weight.shape)]
    factor = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(scaled(weight, factor, torch.float32), (weight.double() * factor).float())
    assert torch.equal(scaled(weight, factor, torch.float64), weight.double() * factor)


def test_a_block_of_a_broadcast_operand_is_cut_with_it() -> None:
    parts = list(blocks(torch.ones(1, 8, 6), torch.arange(8.0).view(1, 8, 1)))
    assert [operand.flatten().tolist() for _, operand in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
