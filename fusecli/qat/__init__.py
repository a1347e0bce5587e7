"""Fake quantization: observers, schemes, and modules that simulate a fold while they learn.

The state dicts are those of torch.ao.quantization's eager quantization-aware training, which is deprecated
and due for removal; nothing here imports it.

    model = fusecli.fuse_modules_qat(model.train(), groups)
    model = prepare_qat(model)
    ...                                  # train
    model.apply(freeze_bn_stats)         # near the end
    model.apply(disable_observer)
"""

from __future__ import annotations

from fusecli.qat.batch_norm import (
    QatConvBn1d,
    QatConvBn2d,
    QatConvBn3d,
    QatConvBnReLU1d,
    QatConvBnReLU2d,
    QatConvBnReLU3d,
    QatLinearBn1d,
    QatNorm,
    freeze_bn_stats,
    update_bn_stats,
)
from fusecli.qat.fake_quantize import (
    FakeQuantize,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from fusecli.qat.layers import (
    QatConv1d,
    QatConv2d,
    QatConv3d,
    QatConvReLU1d,
    QatConvReLU2d,
    QatConvReLU3d,
    QatLayer,
    QatLinear,
    QatLinearReLU,
)
from fusecli.qat.observers import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from fusecli.qat.prepare import prepare_qat
from fusecli.qat.scheme import (
    DEFAULT,
    FBGEMM,
    INT8_PER_CHANNEL,
    INT8_PER_TENSOR,
    QNNPACK,
    UINT7,
    UINT8,
    Scheme,
    TensorScheme,
)

__all__ = [
    "DEFAULT",
    "FBGEMM",
    "INT8_PER_CHANNEL",
    "INT8_PER_TENSOR",
    "QNNPACK",
    "UINT7",
    "UINT8",
    "FakeQuantize",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "PerChannelMinMaxObserver",
    "QatConv1d",
    "QatConv2d",
    "QatConv3d",
    "QatConvBn1d",
    "QatConvBn2d",
    "QatConvBn3d",
    "QatConvBnReLU1d",
    "QatConvBnReLU2d",
    "QatConvBnReLU3d",
    "QatConvReLU1d",
    "QatConvReLU2d",
    "QatConvReLU3d",
    "QatLayer",
    "QatLinear",
    "QatLinearBn1d",
    "QatLinearReLU",
    "QatNorm",
    "Scheme",
    "TensorScheme",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "freeze_bn_stats",
    "prepare_qat",
    "update_bn_stats",
]
