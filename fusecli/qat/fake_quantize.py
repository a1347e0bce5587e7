"""Rounding to the integers of a range and back, in floating point, with a gradient that goes through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.errors import Problem
from fusecli.qat.buffers import Float32Buffers, grow
from fusecli.qat.observers import MinMaxObserver

_NO_RANGE = (
    "fake quantization is on, but nothing has been observed, so there is no range to quantize to; first run "
    "a batch with the observers on, model.apply(enable_observer), or turn it off: "
    "model.apply(disable_fake_quant)"
)


class FakeQuantize(Float32Buffers):
    """What x is after it was stored as integers of the range that `observer` has learned.

        (clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) scale

    The gradient is 1 where x is in the range and 0 where it was clamped (straight-through estimator,
    Krishnamoorthi 2018, arXiv:1806.08342, section 2.4). x has any shape and floating dtype, which the
    result keeps. With the observer on, x is observed first; that is so in eval mode as well, as in
    torch.ao: turn observers off (`disable_observer`) before data comes that should not be learned from.

    Buffers as in torch.ao's FakeQuantize: fake_quant_enabled and observer_enabled uint8 [1] (int64 in its
    fused sibling, which can be loaded too), scale float32 and zero_point int32 ([1], or [c] per channel).
    Raises ValueError, naming itself as `where` says, if there is a value to quantize and nothing was ever
    observed, or if the observer refuses to learn.
    """

    where: str = ""  # its path in the model that it was prepared in

    fake_quant_enabled: Tensor
    observer_enabled: Tensor
    scale: Tensor
    zero_point: Tensor
    activation_post_process: MinMaxObserver

    def __init__(self, observer: MinMaxObserver) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.tensor([1], dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.tensor([1], dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor([1.0], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([0], dtype=torch.int32))
        self.activation_post_process = observer

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x
        if self.observer_enabled[0] == 1:
            self._observe(x.detach())
            scale, zero_point = self.activation_post_process.calculate_qparams()
            self.scale.resize_(scale.shape).copy_(scale)
            self.zero_point.resize_(zero_point.shape).copy_(zero_point)
        return self._rounded(x) if self.fake_quant_enabled[0] == 1 else x

    def extra_repr(self) -> str:
        flags = f"fake_quant_enabled={self.fake_quant_enabled}, observer_enabled={self.observer_enabled}"
        return f"{flags}, scale={self.scale}, zero_point={self.zero_point}"

    def _observe(self, x: Tensor) -> None:
        try:
            self.activation_post_process(x)
        except ValueError as error:
            raise ValueError(str(Problem(str(error), self.where))) from error

    def _rounded(self, x: Tensor) -> Tensor:
        observer = self.activation_post_process
        if not observer.observed:
            raise ValueError(str(Problem(_NO_RANGE, self.where)))
        integers = (observer.quant_min, observer.quant_max)
        if observer.ch_axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *integers)
        return torch.fake_quantize_per_channel_affine(
            x, self.scale, self.zero_point, observer.ch_axis, *integers
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        if self.activation_post_process.ch_axis is not None:
            grow(self.scale, state_dict.get(prefix + "scale"))
            grow(self.zero_point, state_dict.get(prefix + "zero_point"))
        super()._load_from_state_dict(state_dict, prefix, *others)


# For model.apply(...), which calls them with every module; torch.ao's own do not know these classes.


def enable_observer(module: nn.Module) -> None:
    """Lets a FakeQuantize learn its range from now on; other modules stay."""
    if isinstance(module, FakeQuantize):
        module.observer_enabled.fill_(1)


def disable_observer(module: nn.Module) -> None:
    """Keeps the range of a FakeQuantize as it is; other modules stay."""
    if isinstance(module, FakeQuantize):
        module.observer_enabled.fill_(0)


def enable_fake_quant(module: nn.Module) -> None:
    """Lets a FakeQuantize round from now on; other modules stay."""
    if isinstance(module, FakeQuantize):
        module.fake_quant_enabled.fill_(1)


def disable_fake_quant(module: nn.Module) -> None:
    """Lets a FakeQuantize pass tensors through, observed or not; other modules stay."""
    if isinstance(module, FakeQuantize):
        module.fake_quant_enabled.fill_(0)
