"""From float64 to the stored dtype in one rounding, to nearest, ties to even."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusecli.errors import require

_NATIVE = (torch.float64, torch.float32)
_NARROW = (torch.bfloat16, torch.float16)
_EXPONENT = 0x7FF0_0000_0000_0000  # of an IEEE 754 binary64


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The elements of `dtype` nearest to `exact` [any shape, float64]; ties go to the even one.

    The result is a new tensor in the memory order of `exact`.
    dtype: float64, float32, bfloat16 or float16, subnormals included.
    Raises NotFoldable "overflow" when a finite value has no finite neighbour in `dtype`,
    "not-finite" when `exact` holds NaN or Inf, "dtype" for any other dtype. Meta tensors pass.
    """
    if exact.is_meta:
        return torch.empty_strided(exact.shape, exact.stride(), dtype=dtype, device="meta")
    out = torch.empty_like(exact, dtype=dtype)
    round_into(out, exact)
    return out


def round_into(out: Tensor, exact: Tensor) -> None:
    """out = round_once(exact, out.dtype), without allocating the result. Shapes are equal."""
    require(out.dtype in (*_NATIVE, *_NARROW), "dtype", f"fusecli does not round to {out.dtype}")
    out.copy_(exact if out.dtype in _NATIVE else _snapped(exact, out.dtype))
    require_finite(out, exact)


def _snapped(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values that `dtype` holds exactly, nearest to `exact`.

    torch converts float64 to the 16-bit types by way of float32, which rounds twice. Adding and
    taking away m = 1.5 * 2^(e + 53 - p), where 2^e <= |x| < 2^(e+1) and p is the precision of
    `dtype`, rounds once: the last place of m is 2^(e + 1 - p), the last place of x in `dtype`, and
    float64 addition itself rounds to nearest even. Below the smallest normal 2^e stays there,
    which is what makes subnormals right. The subtraction is exact.
    Source: Dekker 1971; Hauser 1996, "Handling floating-point exceptions in numeric programs".
    """
    limits = torch.finfo(dtype)
    precision = 1 - round(math.log2(limits.eps))
    magic = (exact.view(torch.int64) & _EXPONENT).view(torch.float64)
    magic.clamp_(min=limits.smallest_normal).mul_(1.5 * 2.0 ** (53 - precision))
    # x + m - m turns -0.0 into 0.0.
    return (exact + magic).sub_(magic).copysign_(exact)


def require_finite(out: Tensor, exact: Tensor) -> None:
    """Guard: `out`, rounded from `exact`, holds no NaN or Inf; raises NotFoldable as `round_once` does."""
    if not out.numel():
        return
    # A sum hands NaN and Inf on, and costs a few percent of the fold; isfinite() would cost the fold again.
    if math.isfinite(out.sum()):
        return
    finite = torch.isfinite(exact)
    if torch.isfinite(out).all():
        return  # the values are finite, only their sum was not
    require(bool(finite.all()), "not-finite", "the weights hold NaN or Inf", remedy="repair the checkpoint")
    dtype, largest = str(out.dtype).removeprefix("torch."), torch.finfo(out.dtype).max
    require(
        False,
        "overflow",
        f"a folded value of {exact.abs().max().item():.6g} exceeds {largest:.6g}, the largest {dtype}",
        remedy=f"store this layer in {'float64' if out.dtype in _NATIVE else 'float32'}",
    )
