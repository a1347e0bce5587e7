"""Scales and zero points against the formulas, and against torch.ao's own observers on the same values.

The formulas for a range [a, b], widened to contain 0 (Jacob et al. 2018, section 3; torch's MinMaxObserver):
affine s = (b - a) / 255, z = clamp(round(-a / s), 0, 255); symmetric s = max(|a|, |b|) / 127, z = 0.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fusecli.int8.packed import packed
from fusecli.int8.quantize import quantize
from fusecli.int8.units import Options
from fusecli.sample import Sample
from tests.int8.nets import built

RANGES = {"mixed": (-1.5, 2.5), "positive": (0.5, 3.0), "negative": (-4.0, -1.0), "zero": (0.0, 0.0)}


class Identity(nn.Module):
    """A linear layer that changes nothing: the scale of its input is that of the values given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)
        self.linear.weight.data.copy_(torch.eye(3))

    def forward(self, x):
        return self.linear(x)


def batches(name):
    torch.manual_seed(3)
    low, high = RANGES[name]
    return [torch.rand(64, 3) * (high - low) + low for _ in range(3)]


@pytest.mark.parametrize("name", RANGES)
def test_activations_by_their_extremes(name):
    tensors, _ = packed(quantize(Identity().eval(), [Sample((x,)) for x in batches(name)]))
    x = torch.cat(batches(name)).double()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = max((high - low) / 255, float(torch.finfo(torch.float32).eps))
    assert tensors["x.output.scale"].item() == pytest.approx(scale, rel=1e-6)
    assert tensors["x.output.zero_point"].item() == min(max(round(-low / scale), 0), 255)


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
@pytest.mark.parametrize(("name", "axis"), [("Depthwise", 0), ("ConvTranspose", 1)])
def test_weights_by_their_largest(name, axis, weights):
    model = built(name)
    tensors, _ = packed(quantize(model, [Sample((torch.randn(*model.SHAPE),))], Options(weights=weights)))
    weight = model.conv.weight.detach().double().transpose(0, axis)
    largest = weight.flatten(1).abs().amax(1) if weights == "per-channel" else weight.abs().max()
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).eps)
    torch.testing.assert_close(tensors["conv.weight.scale"].double(), scale, rtol=1e-6, atol=0)
    assert "conv.weight.zero_point" not in tensors
    integers = tensors["conv.weight"].transpose(0, axis)
    assert integers.dtype == torch.int8
    assert integers.abs().max() == 127
    each = scale.view(-1, 1, 1, 1) if weights == "per-channel" else scale
    assert torch.equal(integers.double(), torch.round(weight / each).clamp(-127, 127))


def ao_observer(name, **options):
    """torch.ao's observer, which is deprecated, and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import observer

        return getattr(observer, name)(**options)


AFFINE = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
SYMMETRIC = {"dtype": torch.int8, "quant_min": -127, "quant_max": 127}


@pytest.mark.parametrize(
    ("observer", "theirs"), [("minmax", "MinMaxObserver"), ("histogram", "HistogramObserver")]
)
def test_activations_as_torch_ao_observes_them(observer, theirs):
    torch.manual_seed(5)
    samples = [torch.randn(20000, 3) for _ in range(3)]  # with tails that a histogram cuts
    done = quantize(Identity().eval(), [Sample((x,)) for x in samples], Options(observer=observer))
    tensors, _ = packed(done)
    reference = ao_observer(theirs, **AFFINE)
    for x in samples:
        reference(x)
    scale, zero_point = reference.calculate_qparams()
    assert tensors["x.output.scale"].item() == scale.item()
    assert tensors["x.output.zero_point"].item() == zero_point.item()
    widest = (torch.cat(samples).max() - torch.cat(samples).min()) / 255
    assert (tensors["x.output.scale"] < 0.95 * widest) == (observer == "histogram")


def test_weights_as_torch_ao_observes_them():
    model = built("Conv")
    tensors, _ = packed(quantize(model, [Sample((torch.randn(*model.SHAPE),))]))
    reference = ao_observer("PerChannelMinMaxObserver", qscheme=torch.per_channel_symmetric, **SYMMETRIC)
    reference(model.conv.weight)
    assert torch.equal(tensors["conv.weight.scale"], reference.calculate_qparams()[0])


def test_passed_on_values_keep_their_scale():
    model = built("Pools")
    done = quantize(model, [Sample((torch.randn(*model.SHAPE),))])
    tensors, _ = packed(done)
    names = [unit.name for unit in done.units if unit.follows]
    assert len(names) == 7
    assert {tensors[f"{name}.output.scale"].item() for name in names} == {tensors["conv.output.scale"].item()}
    assert {tensors[f"{name}.output.zero_point"].item() for name in names} == {
        tensors["conv.output.zero_point"].item()
    }
