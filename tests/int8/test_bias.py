"""Bias correction: a systematic shift is gone, and what has no bias of its own stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fusecli.int8.bias import correct_biases, miscorrected
from fusecli.int8.flow import tensor_of
from fusecli.int8.packed import packed
from fusecli.int8.quantize import Quantized, quantize
from fusecli.int8.units import Options
from fusecli.int8.watching import node_outputs
from fusecli.sample import Sample


def batches(*shape: int, count: int = 4) -> list[Sample]:
    torch.manual_seed(1)
    return [Sample((torch.rand(*shape),)) for _ in range(count)]  # a mean that is not 0


def coarse(model: nn.Module, given: list[Sample]) -> Quantized:
    """One scale for each weight, whose rows differ: much is lost."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            axis = 1 if isinstance(module, nn.ConvTranspose2d) else 0
            rows = 10 ** torch.linspace(-2, 0, module.weight.shape[axis])
            module.weight.data *= rows.view([-1 if dim == axis else 1 for dim in range(module.weight.ndim)])
    return quantize(model.eval(), given, Options(weights="per-tensor"))


def shift(done: Quantized, node: str, given: list[Sample]) -> Tensor:
    """By how much the mean of each channel is off, over all batches."""
    means = []
    for graph in (done.reference, done.model):
        values = [node_outputs(graph, [node], sample)[node] for sample in given]
        means.append(torch.cat(values).double().transpose(0, 1).flatten(1).mean(1))
    return (means[0] - means[1]).abs()


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), (16, 6), ["linear"]),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        (8, 3, 8, 8),
        ["conv2d_1"],
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2, 2)), (8, 3, 4, 4), ["conv_transpose2d"]),
}


@pytest.mark.parametrize(("build", "shape", "nodes"), NETS.values(), ids=NETS)
def test_the_mean_of_each_channel_moves_to_where_it_was(build, shape, nodes) -> None:
    given = batches(*shape)
    done = coarse(build(), given)
    before = {node: shift(done, node, given) for node in nodes}
    count = correct_biases(done.reference, done.model, done.units, given, lambda _: None)
    assert count == sum(unit.weight is not None for unit in done.units)
    for node in nodes:
        assert shift(done, node, given).mean() < before[node].mean() / 3


def test_a_known_shift_is_put_into_the_bias() -> None:
    """Of one layer, each bias moves by the difference of the means in front of its quantization."""
    given = batches(16, 6)
    done = coarse(nn.Sequential(nn.Linear(6, 8)), given)
    bias = tensor_of(done.model, "0.bias")
    bias += 0.25
    wanted = tensor_of(done.reference, "0.bias").detach().clone()
    correct_biases(done.reference, done.model, done.units, given, lambda _: None)
    x = torch.cat([sample.args[0] for sample in given])
    stored = packed(done)[0]
    weight = stored["0.weight"].double() * stored["0.weight.scale"].double()
    scale, zero = (stored[f"input_1.output.{name}"].double() for name in ("scale", "zero_point"))
    seen = (torch.clamp((x.double() / scale).round() + zero, 0, 255) - zero) * scale
    lost = x.double() @ tensor_of(done.reference, "0.weight").double().T - seen @ weight.T
    assert torch.allclose(bias.double(), wanted + lost.mean(0), atol=1e-5)


def test_layers_without_a_bias_stay_as_they_are() -> None:
    given = batches(8, 3, 8, 8)
    done = coarse(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 3, bias=False)), given)
    before = copy.deepcopy(packed(done)[0])
    assert correct_biases(done.reference, done.model, done.units, given, lambda _: None) == 0
    after = packed(done)[0]
    assert all(torch.equal(after[name], before[name]) for name in before)


class Shared(nn.Module):
    """Two layers of one bias, and one layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.c(self.b(self.a(x))))


def test_a_bias_that_others_read_stays_as_it_is() -> None:
    given = batches(16, 6)
    done = coarse(Shared(), given)
    before = copy.deepcopy(packed(done)[0])
    assert correct_biases(done.reference, done.model, done.units, given, lambda _: None) == 0
    after = packed(done)[0]
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_only_biases_of_the_int8_graph_change() -> None:
    given = batches(16, 6)
    done = coarse(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), given)
    float_before = {name: tensor.clone() for name, tensor in done.reference.state_dict().items()}
    before = copy.deepcopy(packed(done)[0])
    ticks: list[str] = []
    correct_biases(done.reference, done.model, done.units, given, ticks.append)
    after = packed(done)[0]
    assert {name for name in before if not torch.equal(after[name], before[name])} == {"0.bias", "1.bias"}
    assert all(torch.equal(t, float_before[n]) for n, t in done.reference.state_dict().items())
    assert ticks[:4] == [f"correcting biases, batch {n} of 4" for n in range(1, 5)]
    assert ticks[4:] == [f"correcting biases, layer {n} of 2" for n in range(1, 3)]


def test_biases_that_were_corrected_are_found_again() -> None:
    given = batches(16, 6)
    done = coarse(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), given)

    def wrong() -> list[str]:
        return miscorrected(done.reference, done.model, done.units, given, lambda _: None)

    assert wrong() == ["0.bias", "1.bias"]
    correct_biases(done.reference, done.model, done.units, given, lambda _: None)
    assert wrong() == []
    tensor_of(done.model, "1.bias")[2] += 1e-4
    before = copy.deepcopy(packed(done)[0])
    assert wrong() == ["1.bias"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed(done)[0].items())


def test_a_layer_sees_what_the_corrected_ones_before_it_give() -> None:
    """A shift of the first is put into its own bias, and not a second time into the next one's."""
    after = []
    for moved in (0.0, 0.25):
        given = batches(16, 6)  # seeds the weights, too
        done = coarse(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), given)
        tensor_of(done.model, "0.bias").add_(moved)
        correct_biases(done.reference, done.model, done.units, given, lambda _: None)
        after.append(packed(done)[0])
    for name in ("0.bias", "1.bias"):
        assert torch.allclose(after[0][name], after[1][name], atol=1e-3), name


class Tokens(nn.Module):
    """Linear layers on [n, t, c]: as many tokens as channels, so that a mean of the wrong axis would fit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


SPLIT = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), (6,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), (3, 8, 8)),
    "tokens": (Tokens, (8, 6)),
}


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["kept", "run again"])
@pytest.mark.parametrize(("build", "shape"), SPLIT.values(), ids=SPLIT)
def test_a_bias_does_not_depend_on_the_batches(build, shape, limit: int, monkeypatch) -> None:
    """33 samples in batches of 32 and 1: the one must not count for half of the mean."""
    monkeypatch.setattr("fusecli.int8.bias._KEPT", limit)
    (whole,) = batches(33, *shape, count=1)
    x = whole.args[0]
    x[32] *= 3  # unlike the others
    found, moved = [], []
    for sizes in ([33], [32, 1], [1, 32], [11, 11, 11]):
        torch.manual_seed(2)
        done = coarse(build(), [whole])
        before = {name: tensor.detach().clone() for name, tensor in done.reference.named_parameters()}
        given = [Sample((part,)) for part in x.split(sizes)]
        assert correct_biases(done.reference, done.model, done.units, given, lambda _: None) == 2
        stored = {name: tensor for name, tensor in packed(done)[0].items() if name.endswith(".bias")}
        found.append(stored)
        moved.append({name: float((stored[name] - before[name]).abs().max()) for name in stored})
    for other in found[1:]:
        for name, bias in found[0].items():
            assert moved[0][name] > 0
            assert torch.allclose(bias, other[name], rtol=0, atol=0.01 * moved[0][name]), name


def test_tokens_are_corrected_by_channel() -> None:
    given = batches(16, 8, 6)
    done = coarse(Tokens(), given)

    def lost() -> Tensor:
        pairs = [[node_outputs(g, ["linear_1"], s)["linear_1"] for s in given] for g in graphs]
        one, other = (torch.cat(values).double().flatten(0, 1).mean(0) for values in pairs)
        return (one - other).abs().mean()

    graphs = done.reference, done.model
    tensor_of(done.model, "b.bias").add_(torch.linspace(-0.3, 0.3, 8))
    before = lost()
    correct_biases(done.reference, done.model, done.units, given, lambda _: None)
    assert lost() < before / 30
