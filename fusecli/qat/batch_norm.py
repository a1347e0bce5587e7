"""Layers with a batch norm that are trained as if it were folded already.

State-dict keys are those of torch.ao.nn.intrinsic.qat.

What will be quantized is not W but the folded weight, f W per output channel, where

    f = gamma / sqrt(running_var + eps)

so that is what has to be rounded in training; running statistics, since those of the batch would make the
integers jump with each batch (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2; Jacob et al. 2018,
arXiv:1712.05877, section 3.2). Undoing f after the rounding gives the weight that the norm still expects:

    W' = q_w(f W) / f
    z  = bn(conv(x; W') + b)

In eval mode this is the folded layer, gamma (conv(x; W') + b - mean) / sqrt(var + eps) + beta
= conv(x; q_w(f W)) + f (b - mean) + beta; in training, bn takes the statistics of the batch, which is the
correction by sigma_running / sigma_batch of the first paper. One convolution is all it takes.

Where gamma = 0, f W = 0 whatever W is, and W' = W: the channel answers beta, its statistics stay those of
the float layer, and gamma gets its gradient. torch.ao divides the convolution's output by f instead, which is
the same where f != 0, and NaN for ever where it is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fusecli.qat.layers import QatConv1d, QatConv2d, QatConv3d, QatLayer, QatLinear
from fusecli.qat.scheme import DEFAULT, Scheme


class QatNorm(QatLayer):
    """q_a(relu(bn(layer(x; W', b)))), without the relu unless `relu` says so; W' as above.

    What all classes of this file share. `bn` is the norm itself, no copy of it; it needs running statistics.
    """

    bn: Any

    def __init__(self, layer: nn.Module, bn: nn.Module, scheme: Scheme = DEFAULT) -> None:
        self._take_over(layer)
        self.freeze_bn = False
        self.bn = bn
        self._fake_quantize(scheme)

    def freeze_bn_stats(self) -> Self:
        """From now on the running statistics are used and do not change, whatever `train` says."""
        self.freeze_bn = True
        self.bn.eval()
        return self

    def update_bn_stats(self) -> Self:
        """Ends `freeze_bn_stats`: statistics of the batch in train mode, and the running ones follow them."""
        self.freeze_bn = False
        self.bn.train(self.training)
        return self

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.freeze_bn:
            self.bn.eval()
        return self

    def _computed(self, input: Tensor) -> Tensor:
        return self.bn(self._with(input, self._unfolded_weight()))  # type: ignore[no-any-return]

    def _unfolded_weight(self) -> Tensor:
        """W' [o, i, k, ...]: what is left of the weight after it was folded, rounded and unfolded."""
        bn, each = self.bn, (-1, *[1] * (self.weight.dim() - 1))
        gamma = torch.ones_like(bn.running_var) if bn.weight is None else bn.weight
        factor = (gamma / torch.sqrt(bn.running_var + bn.eps)).reshape(each)
        rounded = self.weight_fake_quant(self.weight * factor)
        silent = factor == 0
        # The divisor has no zeros even where the quotient is not taken: its gradient would be 0 * inf, NaN.
        return torch.where(silent, self.weight, rounded / torch.where(silent, 1, factor))


class QatConvBn1d(QatNorm, QatConv1d):
    """q_a(bn(conv(x; W', b))), x [n, c, l]."""


class QatConvBn2d(QatNorm, QatConv2d):
    """q_a(bn(conv(x; W', b))), x [n, c, h, w]."""


class QatConvBn3d(QatNorm, QatConv3d):
    """q_a(bn(conv(x; W', b))), x [n, c, d, h, w]."""


class QatLinearBn1d(QatNorm, QatLinear):
    """q_a(bn(linear(x; W', b))), x [n, c].

    ValueError for x [n, l, c]: there the norm's channels are l, not the layer's outputs.
    """

    def _computed(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            raise ValueError(
                f"QatLinearBn1d takes [n, c], not {list(input.shape)}: its norm could not be folded"
            )
        return super()._computed(input)


class QatConvBnReLU1d(QatConvBn1d):
    """q_a(relu(bn(conv(x; W', b)))), x [n, c, l]."""

    relu = True


class QatConvBnReLU2d(QatConvBn2d):
    """q_a(relu(bn(conv(x; W', b)))), x [n, c, h, w]."""

    relu = True


class QatConvBnReLU3d(QatConvBn3d):
    """q_a(relu(bn(conv(x; W', b)))), x [n, c, d, h, w]."""

    relu = True


# For model.apply(...); torch.ao's own do not know these classes, nor its own LinearBn1d.


def freeze_bn_stats(module: nn.Module) -> None:
    """Freezes the running statistics of a layer with a norm; other modules stay."""
    if isinstance(module, QatNorm):
        module.freeze_bn_stats()


def update_bn_stats(module: nn.Module) -> None:
    """Lets the running statistics of a layer with a norm follow the batches again; other modules stay."""
    if isinstance(module, QatNorm):
        module.update_bn_stats()
