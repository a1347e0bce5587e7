"""Whether a graph holds the float weights, rounded: every network does, and no other numbers do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusecli.int8.flow import tensor_of
from fusecli.int8.packed import float_names, integer_weights
from fusecli.int8.quantize import Quantized, quantize
from fusecli.int8.rounded import misrounded
from fusecli.int8.saved import load, save
from fusecli.int8.units import Options
from fusecli.sample import Sample
from tests.int8.nets import NETS, built


def made(name: str, weights: Any = "per-channel") -> Quantized:
    model = built(name)
    return quantize(model, [Sample((torch.randn(*NETS[name].SHAPE),))], Options(weights=weights))


def wrong(done: Quantized, corrected: bool = False) -> list[str]:
    return misrounded(done.reference, done.model, done.units, corrected=corrected)


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("name", NETS)
def test_what_was_converted_holds_them(name: str, weights: str) -> None:
    done = made(name, weights)
    assert wrong(done) == []


@pytest.mark.parametrize("weights", ["per-channel", "per-tensor"])
@pytest.mark.parametrize("name", ["Conv", "Linear", "ConvTranspose", "GroupedTranspose", "Depthwise"])
@pytest.mark.parametrize("step", [1, -1])
def test_an_integer_that_is_off_by_one_is_seen(name: str, weights: str, step: int) -> None:
    done = made(name, weights)
    ((weight, integers, _, _),) = integer_weights(done)
    for place in (0, integers.numel() // 2):
        integers.view(-1)[place] += step
        assert wrong(done) == [weight]
        integers.view(-1)[place] -= step
    assert wrong(done) == []


def test_a_scale_that_is_another_is_seen() -> None:
    done = made("Conv")
    tensor_of(done.model, "_scale_0")[2] *= 1.01
    assert wrong(done) == ["conv.weight"]
    tensor_of(done.model, "_scale_0")[2] = float("nan")
    assert wrong(done) == ["conv.weight"]


def test_biases_may_be_others_where_they_were_corrected() -> None:
    done = made("Conv")
    tensor_of(done.model, "conv.bias")[0] += 1e-6
    assert wrong(done) == ["conv.bias"]
    assert wrong(done, corrected=True) == []


def test_what_stays_float_and_is_no_bias_may_never_be_another() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3)).eval()
    done = quantize(net, [Sample((torch.randn(4, 3, 6, 6),))])
    assert wrong(done, corrected=True) == []
    assert "0.running_mean" in float_names(done.model)
    tensor_of(done.model, "0.running_mean")[0] += 1e-6
    assert wrong(done, corrected=True) == ["0.running_mean"]


def test_a_layer_that_reads_no_integers_is_wrong() -> None:
    done = made("Conv")
    (layer,) = (node for node in done.model.graph.nodes if node.name == "conv2d")
    layer.args = (layer.args[0], layer.args[1].args[0], *layer.args[2:])
    assert wrong(done) == ["conv.weight"]


def test_a_norm_that_stays_holds_its_numbers_in_the_file(tmp_path: Any) -> None:
    """torch saves the results of a norm that nobody reads, too."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 3)).eval()
    done = quantize(net, [Sample((torch.randn(4, 3, 6, 6),))])
    save(done, tmp_path / "x.pt2")
    names = [node.name for node in done.model.graph.nodes if node.op == "call_function"]
    again = load(tmp_path / "x.pt2", names)
    assert misrounded(done.reference, again, done.units, corrected=False) == []
