"""Which integers a scale was made for, told from what its observer has seen; torch.ao makes the scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusecli.qat.qparams import SIGNED, UNSIGNED, QParams, integers_of, too_wide, unobserved
from tests.qat.oracle import torch_ao

# dtype, quant_min, quant_max, symmetric
MADE: dict[str, tuple[Any, int, int, bool]] = {
    "quint8": (torch.quint8, 0, 255, False),
    "quint8 of 7 bits": (torch.quint8, 0, 127, False),
    "qint8": (torch.qint8, -128, 127, False),
    "qint8 symmetric": (torch.qint8, -128, 127, True),
    "qint8 without the lowest": (torch.qint8, -127, 127, True),
    "quint8 symmetric": (torch.quint8, 0, 255, True),
}
VALUES = {
    "both signs": torch.linspace(-1.3, 2.9, 50),
    "mostly negative": torch.linspace(-4.0, 0.4, 50),
    "negative": torch.linspace(-3.0, -1.0, 50),
    "positive": torch.linspace(0.2, 7.0, 50),
}


def observed(
    what: str, x: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kind, lowest, highest, symmetric = MADE[what]
    with torch_ao() as ao:
        scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
        observer = ao.MinMaxObserver(dtype=kind, qscheme=scheme, quant_min=lowest, quant_max=highest)
        observer(x)
        scale, zero_point = observer.calculate_qparams()
    return scale.to(dtype), zero_point, observer.min_val.to(dtype), observer.max_val.to(dtype)


def rounded(x: Tensor, found: QParams) -> Tensor:
    q = (x / found.scale + found.zero_point).round().clamp(*found.integers)
    return (q - found.zero_point) * found.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("what", MADE)
def test_no_value_that_was_seen_is_clipped(what: str, values: str, dtype: torch.dtype) -> None:
    """Of values of one sign two ranges may be equally right; no value may lose more than its rounding."""
    x = VALUES[values]
    scale, zero_point, low, high = observed(what, x, dtype)
    found = QParams(scale, zero_point, integers_of(scale, zero_point, low, high, weight=False))
    for stored in (found, found.within(UNSIGNED), found.within(SIGNED)):
        room = 1.01 if dtype is torch.float32 else 3.0  # its scale is rounded, its largest integers feel that
        assert (rounded(x, stored) - x).abs().max() <= room * float(scale)
    moved = found.within(UNSIGNED)
    assert UNSIGNED[0] <= moved.integers[0] < moved.integers[1] <= UNSIGNED[1]


@pytest.mark.parametrize("what", MADE)
def test_the_range_itself_where_both_signs_were_seen(what: str) -> None:
    scale, zero_point, low, high = observed(what, VALUES["both signs"])
    _, lowest, highest, _ = MADE[what]
    assert integers_of(scale, zero_point, low, high, weight=False) == (lowest, highest)


def test_without_an_observer_the_zero_point_tells() -> None:
    one = torch.tensor([0.1])
    for zero_point, weight, expected in ((-3, False, SIGNED), (3, False, UNSIGNED), (0, True, SIGNED)):
        assert integers_of(one, torch.tensor([zero_point]), None, None, weight=weight) == expected


def test_scales_that_no_equation_gives() -> None:
    """As of a histogram's search: values below a zero point of 0 are of signed integers only."""
    scale, zero, high = torch.tensor([0.01]), torch.tensor([0]), torch.tensor(4.0)
    assert integers_of(scale, zero, torch.tensor(-4.0), high, weight=False) == SIGNED
    assert integers_of(scale, zero, torch.tensor(0.0), high, weight=False) == UNSIGNED


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_fewer_bits_and_a_zero_point_above_0(bits: int) -> None:
    """Signed values, few of them negative: read as unsigned, all below the zero point would be clipped."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = torch.tensor(-6.0), torch.tensor(2.0)
    scale = ((high - low) / (highest - lowest)).reshape(1)
    zero = (lowest - (low / scale).round()).int()
    assert zero > 0
    assert integers_of(scale, zero, low, high, weight=False) == (lowest, highest)
    assert too_wide(scale, zero, low, high) == ""


@pytest.mark.parametrize(("lowest", "highest"), [(-32768, 32767), (0, 65535), (-2048, 2047), (0, 1023)])
def test_more_bits_than_int8_has(lowest: int, highest: int) -> None:
    for low, high in ((torch.tensor(-5.0), torch.tensor(3.0)), (torch.tensor(0.0), torch.tensor(2.0))):
        scale = ((high - low) / (highest - lowest)).reshape(1)
        zero = (lowest - (low / scale).round()).int()
        assert "more than 8 bits" in too_wide(scale, zero, low, high)


@pytest.mark.parametrize("what", MADE)
@pytest.mark.parametrize("values", VALUES)
def test_eight_bits_are_not_too_wide(what: str, values: str) -> None:
    assert too_wide(*observed(what, VALUES[values])) == ""


def test_for_each_channel() -> None:
    weight = torch.randn(5, 7) * torch.tensor([0.1, 1, 3, 1e-3, 2]).view(-1, 1)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    scale = torch.maximum(-low, high) / 127.5
    zero = torch.zeros(5, dtype=torch.int32)
    assert integers_of(scale, zero, low, high, weight=True) == SIGNED
    assert QParams(scale, zero, SIGNED).within(SIGNED).zero_point is zero


INF = torch.tensor(float("inf"))


@pytest.mark.parametrize(
    ("scale", "low", "high", "said"),
    [
        (torch.ones(1), INF, -INF, "never seen a value"),
        (torch.ones(1), torch.tensor([]), torch.tensor([]), "never seen a value"),
        (torch.ones(2), torch.tensor([0.0, INF]), torch.tensor([1.0, -INF]), "never seen a value"),
        (torch.tensor([float("nan")]), None, None, "no positive number"),
        (torch.zeros(1), None, None, "no positive number"),
        (torch.ones(1), None, None, ""),
        (torch.ones(1), torch.tensor(-1.0), torch.tensor(1.0), ""),
    ],
)
def test_what_was_never_observed(scale: Tensor, low: Tensor | None, high: Tensor | None, said: str) -> None:
    found = unobserved(scale, low, high)
    assert (said in found) if said else not found
