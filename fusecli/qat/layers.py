"""Layers whose weight and output are fake-quantized, with the state-dict keys of torch.ao.nn.qat.

Each takes a layer over as it is: the same parameters, hooks and attributes; nothing is copied.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from fusecli.qat.fake_quantize import FakeQuantize
from fusecli.qat.scheme import DEFAULT, Scheme


class QatLayer(nn.Module):
    """q_a(relu(layer(x; q_w(W), b))), without the relu unless `relu` says so.

    What all classes here share; each goes before the layer's own class. q_w is `weight_fake_quant`, q_a is
    `activation_post_process` (fusecli.qat.FakeQuantize). Jacob et al. 2018 (arXiv:1712.05877), figure 1.1b.
    """

    relu: ClassVar[bool] = False
    weight: Any
    bias: Any
    weight_fake_quant: FakeQuantize
    activation_post_process: FakeQuantize

    def __init__(self, layer: nn.Module, scheme: Scheme = DEFAULT) -> None:
        self._take_over(layer)
        self._fake_quantize(scheme)

    def forward(self, input: Tensor) -> Tensor:
        output = self._computed(input)
        return self.activation_post_process(F.relu(output) if self.relu else output)  # type: ignore[no-any-return]

    def _take_over(self, layer: nn.Module) -> None:
        # The dictionaries of hooks are shared, not copied: the handles that remove hooks point to them.
        nn.Module.__init__(self)
        self.__dict__.update(vars(layer))
        for registry in ("_parameters", "_buffers", "_modules"):
            self.__dict__[registry] = vars(layer)[registry].copy()

    def _fake_quantize(self, scheme: Scheme) -> None:
        self.weight_fake_quant = scheme.weight.fake_quantize().to(self.weight.device)
        self.activation_post_process = scheme.activation.fake_quantize().to(self.weight.device)

    def _computed(self, input: Tensor) -> Tensor:
        return self._with(input, self.weight_fake_quant(self.weight))

    def _with(self, input: Tensor, weight: Tensor) -> Tensor:
        """The layer with that weight and its own bias."""
        # _conv_forward is where each convolution of torch keeps its padding modes.
        conv: Any = self
        return conv._conv_forward(input, weight, self.bias)  # type: ignore[no-any-return]


class QatConv1d(QatLayer, nn.Conv1d):
    """q_a(conv(x; q_w(W), b)), x [n, c, l]."""


class QatConv2d(QatLayer, nn.Conv2d):
    """q_a(conv(x; q_w(W), b)), x [n, c, h, w]."""


class QatConv3d(QatLayer, nn.Conv3d):
    """q_a(conv(x; q_w(W), b)), x [n, c, d, h, w]."""


class QatLinear(QatLayer, nn.Linear):
    """q_a(linear(x; q_w(W), b)), x [..., c]."""

    def _with(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, weight, self.bias)


class QatConvReLU1d(QatConv1d):
    """q_a(relu(conv(x; q_w(W), b))), x [n, c, l]."""

    relu = True


class QatConvReLU2d(QatConv2d):
    """q_a(relu(conv(x; q_w(W), b))), x [n, c, h, w]."""

    relu = True


class QatConvReLU3d(QatConv3d):
    """q_a(relu(conv(x; q_w(W), b))), x [n, c, d, h, w]."""

    relu = True


class QatLinearReLU(QatLinear):
    """q_a(relu(linear(x; q_w(W), b))), x [..., c]."""

    relu = True
