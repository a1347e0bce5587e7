"""The plain tensors: what they are called, and that the graph comes back from them bit by bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save

from fusecli.errors import UsageError
from fusecli.int8.packed import packed, unpacked
from fusecli.int8.quantize import quantize
from fusecli.int8.units import Options
from fusecli.sample import Sample
from tests.int8.nets import NETS, built


def through_a_file(tensors, facts):
    return load(save(tensors)), json.loads(json.dumps(facts))


def another(name):
    """The same code, other weights."""
    model = built(name)
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("name", ["AddReLU", "Pools", "ConvBNReLU", "GroupedTranspose", "SharedWeight"])
def test_the_graph_comes_back_bit_by_bit(name, weights):
    model = built(name)
    batches = [Sample((torch.randn(*model.SHAPE),)) for _ in range(3)]
    done = quantize(model, batches, Options(weights=weights))
    tensors, facts = through_a_file(*packed(done))
    again = unpacked(another(name), Sample((torch.randn(3, *model.SHAPE[1:]),)), tensors, facts)
    x = torch.randn(7, *model.SHAPE[1:])
    assert torch.equal(again(x), done.model(x))
    assert str(again.code) == str(done.model.code)


class Mixed(NETS["Conv"]):
    """A norm that was not folded, with buffers, and a weight with a zero point that was learned."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(5)

    def forward(self, x):
        return torch.nn.functional.silu(self.norm(self.conv(x)))


def mixed():
    model = Mixed().eval()
    model.norm.running_mean.normal_()
    return model


def test_what_stays_float_keeps_its_name_and_value():
    model = mixed()
    known = {"conv.weight": (torch.full((5,), 0.01), torch.tensor([0, 1, 2, 3, 4]))}
    done = quantize(model, [Sample((torch.randn(2, 3, 6, 6),))], known=known)
    tensors, facts = through_a_file(*packed(done))
    assert {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()} == {
        "conv.weight": "int8",
        "conv.weight.scale": "float32",
        "conv.weight.zero_point": "int32",
        "conv.bias": "float32",
        "conv.output.scale": "float32",
        "conv.output.zero_point": "int32",
        "x.output.scale": "float32",
        "x.output.zero_point": "int32",
        **{f"norm.{name}": "float32" for name in ("weight", "bias", "running_mean", "running_var")},
    }
    assert torch.equal(tensors["norm.running_mean"], model.norm.running_mean)
    again = unpacked(mixed(), Sample((torch.randn(1, 3, 6, 6),)), tensors, facts)
    x = torch.randn(4, 3, 6, 6)
    assert torch.equal(again(x), done.model(x))


def test_no_deprecated_dtype():
    tensors, facts = packed(quantize(built("Conv"), [Sample((torch.randn(2, 3, 6, 6),))]))
    assert not any(tensor.is_quantized for tensor in tensors.values())
    assert facts["version"] == 1
    assert facts["options"] == {"observer": "minmax", "weights": "per-channel"}
    assert facts["units"] == [
        {
            "name": "conv",
            "modules": ["conv"],
            "nodes": ["conv2d"],
            "output": "conv2d",
            "weight": "conv.weight",
            "kind": "conv2d",
            "follows": False,
        }
    ]


@pytest.fixture
def parts():
    sample = Sample((torch.randn(2, 3, 6, 6),))
    tensors, facts = packed(quantize(built("Conv"), [sample]))
    return sample, tensors, facts


def test_another_model_is_refused(parts):
    sample, tensors, facts = parts
    with pytest.raises(UsageError, match="units are not those that were packed"):
        unpacked(built("ConvReLU"), sample, tensors, facts)
    wider = built("Conv")
    wider.conv = torch.nn.Conv2d(3, 6, 3, padding=1)
    with pytest.raises(UsageError, match=r"conv\.weight: these are no scale"):
        unpacked(wider.eval(), sample, tensors, facts)


@pytest.mark.parametrize("name", ["conv.weight", "conv.weight.scale", "conv.bias", "x.output.scale"])
def test_a_missing_tensor_is_named(parts, name):
    sample, tensors, facts = parts
    del tensors[name]
    with pytest.raises(UsageError, match=f"{name}: it is missing"):
        unpacked(built("Conv"), sample, tensors, facts)


def test_a_tensor_of_another_shape_is_named(parts):
    sample, tensors, facts = parts
    tensors["conv.bias"] = torch.zeros(4)
    with pytest.raises(
        UsageError, match=r"conv\.bias: it is float32 \(4,\), and float32 \(5,\) belongs here"
    ):
        unpacked(built("Conv"), sample, tensors, facts)


def test_another_version_is_refused(parts):
    sample, tensors, facts = parts
    with pytest.raises(UsageError, match="they are of version 2, and 1 is read here"):
        unpacked(built("Conv"), sample, tensors, facts | {"version": 2})
