"""round_once against exact arithmetic: fractions, and every neighbour pair of the 16-bit types."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fusecli.algebra import round_once
from fusecli.errors import NotFoldable

PRECISION = {torch.float32: (24, -126), torch.bfloat16: (8, -126), torch.float16: (11, -14)}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DTYPES = list(PRECISION)


def nearest(x: float, dtype: torch.dtype) -> Fraction:
    """The value of `dtype` nearest to x, ties to even, by rational arithmetic."""
    precision, smallest = PRECISION[dtype]
    exponent = max(math.frexp(x)[1] - 1, smallest)
    quantum = Fraction(2) ** (exponent - precision + 1)
    return round(Fraction(x) / quantum) * quantum


def patterns(dtype: torch.dtype) -> Tensor:
    """Bit patterns of positive finite values: all of a 16-bit type, of float32 a sample and both ends."""
    last = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(BITS[dtype]))
    if last < 1 << 15:
        return torch.arange(last + 1)
    drawn = torch.randint(0, last, (100_000,), generator=torch.Generator().manual_seed(0))
    subnormal = torch.randint(0, 1 << 23, (100_000,), generator=torch.Generator().manual_seed(1))
    return torch.cat([torch.arange(1000), subnormal, drawn, torch.arange(last - 1000, last + 1)])


def values(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(BITS[dtype]).view(dtype).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_the_dtype_stand(dtype: torch.dtype) -> None:
    held = values(patterns(dtype), dtype)
    held = torch.cat([held, -held])
    rounded = round_once(held, dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded.double(), held)
    assert torch.equal(rounded.signbit(), held.signbit())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_midpoints_go_to_the_even_neighbour_and_nothing_else_does(dtype: torch.dtype) -> None:
    bits = patterns(dtype)[:-1]
    low, high = values(bits, dtype), values(bits + 1, dtype)
    middle = (low + high) / 2
    even = torch.where(bits % 2 == 0, low, high)
    below = torch.nextafter(middle, torch.zeros_like(middle))
    above = torch.nextafter(middle, torch.full_like(middle, math.inf))
    for exact, expected in ((middle, even), (below, low), (above, high)):
        assert torch.equal(round_once(exact, dtype).double(), expected)
        assert torch.equal(round_once(-exact, dtype).double(), -expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-7, 6e-39, 1e-40, 1e-45, 1e-300])
def test_random_values_against_fractions(dtype: torch.dtype, scale: float) -> None:
    rng = torch.Generator().manual_seed(3)
    exact = torch.randn(2000, generator=rng, dtype=torch.float64) * scale
    rounded = round_once(exact, dtype).double().tolist()
    assert all(Fraction(r) == nearest(x, dtype) for r, x in zip(rounded, exact.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torch_rounds_the_narrow_dtypes_twice(dtype: torch.dtype) -> None:
    """The reason for all this: on the day torch rounds once, round_once may be a cast."""
    low = torch.ones((), dtype=torch.float64)
    above = low + torch.finfo(dtype).eps / 2 + 2.0**-50
    assert above.to(dtype) == low
    assert round_once(above, dtype) == low + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_empty_meta_and_any_shape(dtype: torch.dtype) -> None:
    for shape in [(0,), (), (2, 3, 4)]:
        assert round_once(torch.ones(shape, dtype=torch.float64), dtype).shape == shape
    meta = round_once(torch.empty(2, 3, dtype=torch.float64, device="meta"), dtype)
    assert (meta.is_meta, meta.shape, meta.dtype) == (True, (2, 3), dtype)


def test_the_memory_order_stays_and_the_input_too() -> None:
    exact = torch.randn(3, 4, 5, dtype=torch.float64).permute(2, 0, 1)
    before = exact.clone()
    for dtype in (*DTYPES, torch.float64):
        rounded = round_once(exact, dtype)
        assert rounded.stride() == exact.stride()
        assert rounded.data_ptr() != exact.data_ptr()
    assert torch.equal(exact, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_starts_half_a_step_above_the_largest(dtype: torch.dtype, sign: int) -> None:
    largest = torch.finfo(dtype).max
    step = 2.0 ** (math.frexp(largest)[1] - PRECISION[dtype][0])
    edge = torch.tensor([1.0, sign * (largest + step / 2)], dtype=torch.float64)
    assert round_once(torch.nextafter(edge, torch.zeros_like(edge)), dtype)[1] == sign * largest
    for beyond in (edge, edge * 2, torch.tensor([sign * 1e308], dtype=torch.float64)):
        with pytest.raises(NotFoldable) as refusal:
            round_once(beyond, dtype)
        assert refusal.value.code == "overflow"
        assert str(dtype).removeprefix("torch.") in refusal.value.reason


def test_overflow_suggests_a_dtype_that_holds_the_value() -> None:
    for dtype, wider in [(torch.float16, "float32"), (torch.bfloat16, "float32"), (torch.float32, "float64")]:
        with pytest.raises(NotFoldable) as refusal:
            round_once(torch.tensor([1e39], dtype=torch.float64), dtype)
        assert wider in refusal.value.remedy


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_case_35_nan_and_inf_never_pass(dtype: torch.dtype, bad: float) -> None:
    with pytest.raises(NotFoldable) as refusal:
        round_once(torch.tensor([1.0, bad, 2.0], dtype=torch.float64), dtype)
    assert refusal.value.code == "not-finite"


def test_other_dtypes_are_refused() -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(NotFoldable) as refusal:
            round_once(torch.ones(2, dtype=torch.float64), dtype)
        assert refusal.value.code == "dtype"
