from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusecli.algebra import ChannelAffine, Geometry, LinearOp, fold_output, pack, unpack
from fusecli.algebra.blocks import BLOCK
from fusecli.errors import NotFoldable
from tests.algebra.grid import CASES, GROUPED_LINEAR, Case, affine, close, each, lift, random

TRANSPOSED = [case for case in CASES if case.op.geometry.transposed]


@each(CASES)
def test_law(case: Case) -> None:
    op, x = case.op, case.x
    f = affine(op.out_channels)
    folded = fold_output(op, f)
    assert folded.geometry == op.geometry
    assert close(folded(x), f(op(x)))


def test_law_of_a_grouped_linear() -> None:
    f, x = affine(6), random(5, 8)
    assert close(fold_output(GROUPED_LINEAR, f)(x), f(GROUPED_LINEAR(x)))


@each(TRANSPOSED)
def test_case_18_a_transposed_conv_takes_its_folded_weight_as_it_stands(case: Case) -> None:
    module, x = case.module, case.x
    f = affine(module.out_channels)
    with torch.no_grad():
        expected = f(module(x))
        folded = fold_output(lift(module), f)
        stored = pack(folded.weight, True)
        assert stored.shape == module.weight.shape
        assert stored.stride() == module.weight.stride()
        assert stored.data_ptr() == folded.weight.data_ptr()
        module.weight.copy_(stored)
        module.bias = nn.Parameter(folded.bias)
        assert close(module(x), expected)


def test_case_18_would_show_a_transposed_conv_folded_along_the_wrong_axis() -> None:
    up = nn.ConvTranspose1d(4, 4, 3, bias=False).double()
    f, x = affine(4), random(2, 4, 5)
    swapped = fold_output(LinearOp(unpack(up.weight, 1, False), None, lift(up).geometry), f)
    wrong = LinearOp(unpack(pack(swapped.weight, False), 1, True), swapped.bias, swapped.geometry)
    assert (wrong(x) - f(lift(up)(x))).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_case_37_weight_and_bias_come_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(3, 5, 3).to(dtype)
    folded = fold_output(lift(conv), affine(5), dtype)
    assert folded.bias is not None
    assert folded.weight.dtype == folded.bias.dtype == dtype
    assert fold_output(lift(conv), affine(5)).weight.dtype == torch.float64


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_memory_order_stays(layout: torch.memory_format) -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2).to(memory_format=layout)
    folded = fold_output(lift(conv), affine(6), torch.float32)
    assert pack(folded.weight, False).stride() == conv.weight.stride()


def test_the_input_is_never_written() -> None:
    op = LinearOp(random(1, 4, 3, 3), random(4), Geometry((1,), ((0, 0),), (1,)))
    assert op.bias is not None
    before = (op.weight.clone(), op.bias.clone(), op.weight._version, op.bias._version)
    folded = fold_output(op, affine(4))
    assert folded.weight.data_ptr() != op.weight.data_ptr()
    assert torch.equal(op.weight, before[0])
    assert torch.equal(op.bias, before[1])
    assert (op.weight._version, op.bias._version) == before[2:]


def test_on_meta_only_shapes_are_computed() -> None:
    with torch.device("meta"):
        op = lift(nn.ConvTranspose2d(8, 6, 3, groups=2))
        f = ChannelAffine(torch.empty(6, dtype=torch.float64), torch.empty(6, dtype=torch.float64))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        folded = fold_output(op, f, dtype)
        assert folded.bias is not None
        assert folded.weight.is_meta
        assert (folded.weight.shape, folded.weight.stride()) == (op.weight.shape, op.weight.stride())
        assert folded.weight.dtype == folded.bias.dtype == dtype


def test_case_22_other_channels_are_refused() -> None:
    with pytest.raises(NotFoldable) as refusal:
        fold_output(GROUPED_LINEAR, affine(5))
    assert refusal.value.code == "shape"


def test_case_36_a_float16_weight_that_overflows_is_refused() -> None:
    conv = lift(nn.Conv1d(2, 2, 3).half())
    f = ChannelAffine(torch.tensor([1.0, 1e6], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert fold_output(conv, f)(torch.ones(1, 2, 3)).abs().max() > torch.finfo(torch.float16).max
    with pytest.raises(NotFoldable) as refusal:
        fold_output(conv, f, torch.float16)
    assert refusal.value.code == "overflow"
    assert "float32" in refusal.value.remedy
    fold_output(conv, f, torch.float32)


def test_case_36_a_bias_that_overflows_is_refused() -> None:
    f = ChannelAffine(torch.ones(2, dtype=torch.float64), torch.full((2,), 7e4, dtype=torch.float64))
    with pytest.raises(NotFoldable) as refusal:
        fold_output(lift(nn.Conv1d(2, 2, 3).half()), f, torch.float16)
    assert refusal.value.code == "overflow"


@pytest.mark.parametrize("position", [0, -1])
def test_case_35_a_weight_that_is_not_finite_is_refused(position: int) -> None:
    conv = nn.Conv2d(64, 512, 3)
    assert conv.weight.numel() > 2 * BLOCK
    conv.weight.data.view(-1)[position] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(NotFoldable) as refusal:
            fold_output(lift(conv), affine(512), dtype)
        assert refusal.value.code == "not-finite"


class Allocations(TorchDispatchMode):
    """Counts operators, and the elements of the largest float64 tensor that any of them returned."""

    calls = 0
    largest = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [nn.Conv2d(64, 512, 3), nn.ConvTranspose2d(512, 64, 3)], ids=repr)
def test_the_float64_image_of_the_weight_never_exists(layer: Any, dtype: torch.dtype) -> None:
    op, f = lift(layer.to(dtype)), affine(layer.out_channels)
    assert op.weight.numel() > 2 * BLOCK
    with Allocations() as seen:
        fold_output(op, f, dtype)
    assert 0 < seen.largest <= BLOCK


def test_a_small_layer_costs_few_operators() -> None:
    op, f = lift(nn.Conv2d(64, 48, 3)), affine(48)
    assert op.weight.numel() <= BLOCK
    with Allocations() as seen:
        fold_output(op, f, torch.float32)
    assert seen.calls <= 20
