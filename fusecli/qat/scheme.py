"""Which integers stand for which tensors: schemes for weights and activations, and the usual ones by name."""

from __future__ import annotations

from dataclasses import dataclass

from fusecli.qat.fake_quantize import FakeQuantize
from fusecli.qat.observers import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver


@dataclass(frozen=True)
class TensorScheme:
    """How one kind of tensor is quantized: to the integers quant_min..quant_max, at most 8 bits of them.

        affine      scale = (hi - lo) / (quant_max - quant_min), zero_point = quant_min - round(lo / scale)
        symmetric   scale = 2 max(-lo, hi) / (quant_max - quant_min), zero_point = 0

    (Krishnamoorthi 2018, arXiv:1806.08342, sections 2.1 and 2.2), with one scale for the tensor or one for
    each channel, dimension 0 (section 2.6). lo and hi follow the tensor's range: m + c (new - m), where c is
    `averaging_constant`; 1 is no memory.

    Raises ValueError for a range of integers that is none, or does not hold 0, or not the symmetric one.
    """

    quant_min: int
    quant_max: int
    symmetric: bool = False
    per_channel: bool = False
    averaging_constant: float = 0.01

    def __post_init__(self) -> None:
        if self.quant_max - self.quant_min > 255:
            raise ValueError(f"{self.quant_min}..{self.quant_max} does not fit into 8 bits")
        self.fake_quantize()  # the observer has its own demands

    def fake_quantize(self) -> FakeQuantize:
        """A new module for one tensor, nothing observed yet."""
        kind = MovingAveragePerChannelMinMaxObserver if self.per_channel else MovingAverageMinMaxObserver
        constant = self.averaging_constant
        integers = (self.quant_min, self.quant_max)
        return FakeQuantize(kind(*integers, symmetric=self.symmetric, averaging_constant=constant))


# The range of a weight is known exactly at each step, so it needs no memory.
INT8_PER_CHANNEL = TensorScheme(-128, 127, symmetric=True, per_channel=True, averaging_constant=1)
INT8_PER_TENSOR = TensorScheme(-128, 127, symmetric=True, averaging_constant=1)
UINT8 = TensorScheme(0, 255)
# x86 kernels without VNNI add two products of 8 bits in 16: 2 * 255 * 128 overflows, 2 * 127 * 128 does not.
UINT7 = TensorScheme(0, 127)


@dataclass(frozen=True)
class Scheme:
    """How a model is quantized: `weight` for the weights, `activation` for what the layers answer.

        y = q_a(relu(q_w(W) * x + b))

    (Jacob et al. 2018, arXiv:1712.05877, section 3). Raises ValueError for activations per channel: there the
    integer kernels would have to rescale inside their sums (Krishnamoorthi 2018, section 2.6).
    """

    weight: TensorScheme = INT8_PER_CHANNEL
    activation: TensorScheme = UINT8

    def __post_init__(self) -> None:
        if self.activation.per_channel:
            raise ValueError("activations have one scale for the tensor, not one for each channel")


DEFAULT = Scheme()
# The numbers of torch.ao.quantization.get_default_qat_qconfig("fbgemm") and ("qnnpack"); their weights have
# memory, although the comments beside them say that they have none.
FBGEMM = Scheme(TensorScheme(-128, 127, symmetric=True, per_channel=True), UINT7)
QNNPACK = Scheme(TensorScheme(-128, 127, symmetric=True), UINT8)
