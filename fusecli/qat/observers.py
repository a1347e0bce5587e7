"""What range of numbers a tensor has had, and the integers that cover it.

The buffers have the names, shapes and dtypes of torch.ao's observers, so that state dicts are
interchangeable. Three things are done differently: a batch with NaN or infinity is an error and is
not learned from, since fake quantization turns such values into ordinary ones and the loss would
never show them; an observer that has seen nothing has no scale, where theirs answers 1; and all
buffers stay float32 when the model goes to another dtype: a moving average of 1 % is lost in the
eight bits of bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusecli.qat.buffers import Float32Buffers, grow

_NOT_FINITE = (
    "a tensor of shape {} has NaN or infinite values, or a range beyond float32, and no range can be learned "
    "from it; the training may have diverged (lower the learning rate), or turn the observers off: "
    "model.apply(disable_observer)"
)
_NOTHING_SEEN = (
    "nothing has been observed, so there is no range to quantize to; run a batch through the model with "
    "its observers on: model.apply(enable_observer)"
)


class MinMaxObserver(Float32Buffers):
    """The smallest and the largest value of all tensors seen.

    The integers are quant_min..quant_max (qmin, qmax below); x is quantized to
    q = clamp(round(x / scale) + zero_point, qmin, qmax), with lo = min(min_val, 0), hi = max(max_val, 0):

        affine      scale = max((hi - lo) / (qmax - qmin), eps)
                    zero_point = clamp(qmin - round(lo / scale), qmin, qmax)
        symmetric   scale = max(2 max(-lo, hi) / (qmax - qmin), eps)
                    zero_point = 0

    Zero is always one of the numbers, since padding is made of it. Sources: Jacob et al. 2018
    (arXiv:1712.05877) section 2.1 for q, section 3 for learning the range; Krishnamoorthi 2018
    (arXiv:1806.08342) sections 2.1 (affine) and 2.2 (symmetric).

    Buffers: eps [1], min_val [] and max_val [], inf and -inf as long as nothing is seen.
    Raises ValueError for integers without 0 among them, or a symmetric range without negative ones.
    """

    _version = 3  # of torch.ao's observers: theirs read their own older layouts by it
    ch_axis: int | None = None
    eps: Tensor
    min_val: Tensor
    max_val: Tensor

    def __init__(
        self, quant_min: int = 0, quant_max: int = 255, *, symmetric: bool = False, eps: float = 2**-23
    ) -> None:
        super().__init__()
        if not quant_min <= 0 <= quant_max or quant_min == quant_max:
            raise ValueError(f"0 has to be one of the integers, not {quant_min}..{quant_max}")
        if symmetric and quant_min == 0:
            raise ValueError(f"a symmetric range needs negative integers, not {quant_min}..{quant_max}")
        self.quant_min, self.quant_max, self.symmetric = quant_min, quant_max, symmetric
        self.register_buffer("eps", torch.tensor([eps], dtype=torch.float32))
        for name, unseen in zip(("min_val", "max_val"), self._unseen(), strict=True):
            self.register_buffer(name, torch.tensor(unseen, dtype=torch.float32))

    @property
    def observed(self) -> bool:
        """Whether anything has been seen; False too for the NaN that torch.ao's observers learn."""
        return self.min_val.numel() > 0 and bool((self.min_val <= self.max_val).all())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x itself, after its range was learned; ValueError, and nothing learned, if that is not finite."""
        if x.numel() == 0:
            return x
        low, high = self._extremes(x.detach().to(torch.float32))
        if self.observed:
            low, high = self._joined(low, high)
        if not torch.isfinite(high - low).all():
            raise ValueError(_NOT_FINITE.format(list(x.shape)))
        self.min_val.resize_(low.shape).copy_(low)
        self.max_val.resize_(high.shape).copy_(high)
        return x

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """(scale float32, zero_point int32), [1] or one per channel; ValueError if nothing was seen."""
        if not self.observed:
            raise ValueError(_NOTHING_SEEN)
        low, high, steps = (
            self.min_val.clamp(max=0),
            self.max_val.clamp(min=0),
            self.quant_max - self.quant_min,
        )
        if self.symmetric:
            scale = torch.max(torch.max(-low, high) / (steps / 2), self.eps)
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        scale = torch.max((high - low) / steps, self.eps)
        zero_point = self.quant_min - torch.round(low / scale).to(torch.int32)
        return scale, zero_point.clamp(self.quant_min, self.quant_max)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "affine"
        return f"{self.quant_min}..{self.quant_max}, {kind}, min_val={self.min_val}, max_val={self.max_val}"

    def _unseen(self) -> tuple[Any, Any]:
        return float("inf"), float("-inf")

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(x)
        return low, high

    def _joined(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return torch.min(low, self.min_val), torch.max(high, self.max_val)


class PerChannelMinMaxObserver(MinMaxObserver):
    """The smallest and the largest value of each channel: min_val and max_val [c], [0] at first.

    Channels are counted along `ch_axis`: 0 for the weight [o, i, k, ...] of a convolution or linear layer.
    """

    def __init__(self, quant_min: int = 0, quant_max: int = 255, *, ch_axis: int = 0, **options: Any) -> None:
        super().__init__(quant_min, quant_max, **options)
        self.ch_axis = ch_axis

    def _unseen(self) -> tuple[Any, Any]:
        return [], []

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.ch_axis is not None
        low, high = torch.aminmax(x.movedim(self.ch_axis, 0).reshape(x.shape[self.ch_axis], -1), dim=1)
        return low, high

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        for name, buffer in (("min_val", self.min_val), ("max_val", self.max_val)):
            grow(buffer, state_dict.get(prefix + name))
        super()._load_from_state_dict(state_dict, prefix, *others)


class MovingAverageMinMaxObserver(MinMaxObserver):
    """Moving averages of the smallest and the largest value: m + c (new - m), the first tensor's as they are.

    c is `averaging_constant` (Jacob et al. 2018 section 3.1 smooths over thousands of steps). With 1 there is
    no memory: the range is that of the last tensor.
    """

    def __init__(
        self, quant_min: int = 0, quant_max: int = 255, *, averaging_constant: float = 0.01, **options: Any
    ) -> None:
        super().__init__(quant_min, quant_max, **options)
        if not 0 < averaging_constant <= 1:
            raise ValueError(f"the averaging constant has to be in (0, 1], not {averaging_constant}")
        self.averaging_constant = averaging_constant

    def _joined(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        c = self.averaging_constant
        if c == 1:  # m + (new - m) need not be new
            return low, high
        return self.min_val + c * (low - self.min_val), self.max_val + c * (high - self.max_val)


class MovingAveragePerChannelMinMaxObserver(MovingAverageMinMaxObserver, PerChannelMinMaxObserver):
    """Moving averages of the smallest and the largest value of each channel: min_val and max_val [c]."""
