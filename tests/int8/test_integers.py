"""Every quantized op against integer arithmetic that is written out in float64."""

from __future__ import annotations

import pytest
import torch

from fusecli.int8.quantize import quantize
from fusecli.int8.units import Options
from fusecli.sample import Sample
from tests.int8.nets import NETS, Textbook, built

KINDS = {
    "Conv": ["conv2d"],
    "ConvReLU": ["conv2d+relu"],
    "ConvReLU6": ["conv2d+relu6"],
    "ConvBN": ["conv2d"],
    "ConvBNReLU": ["conv2d+relu"],
    "Linear": ["linear"],
    "LinearReLU": ["linear+relu"],
    "Add": ["conv2d", "conv2d", "add"],
    "AddReLU": ["conv2d", "conv2d", "add+relu"],
    "Mul": ["conv2d", "conv2d", "mul"],
    "Cat": ["conv2d", "conv2d", "conv2d", "cat"],
    "ReLUAlone": ["conv2d+relu", "add"],
    "ReLUBeside": ["conv2d", "relu", "add"],
    "Pools": [
        *("conv2d", "max_pool2d", "avg_pool2d", "pad", "upsample_nearest2d", "adaptive_avg_pool2d"),
        *("view", "transpose"),
    ],
    "Depthwise": ["conv2d"],
    "Conv1d": ["conv1d", "mean"],
    "Conv3d": ["conv3d"],
    "ConvTranspose": ["conv_transpose2d"],
    "GroupedTranspose": ["conv_transpose2d"],
    "SharedWeight": ["linear", "linear", "linear"],
}


def test_every_net_has_its_kinds():
    assert list(KINDS) == list(NETS)


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("name", NETS)
def test_int8_is_textbook_arithmetic(name, weights):
    model = built(name)
    batches = [Sample((torch.randn(*model.SHAPE),)) for _ in range(4)]
    quantized = quantize(model, batches, Options(weights=weights))
    assert [unit.kind for unit in quantized.units] == KINDS[name]

    textbook = Textbook(quantized, model)
    x = torch.randn(32, *model.SHAPE[1:]) * 1.2  # some of it beyond what was calibrated
    with torch.no_grad():
        found, exact = quantized.model(x).double(), model(x).double()
        wanted = NETS[name].integers(model, textbook, x.double())
    last = quantized.units[-1]
    step = textbook.scales[f"{last.name}.output.scale"].double()
    steps = ((found - wanted) / step).abs()
    assert steps.max() < 1.001
    ties = 0.1 if name == "Pools" else 0.01  # the mean of four integers is often just between two
    assert (steps > 0.5).double().mean() < ties  # where float32 rounds to the other side
    assert (found - exact).abs().max() > 0.1 * step  # it is no float network
    assert (found - exact).abs().mean() < 0.12 * exact.abs().mean()
