"""Calibration and learned scales: what is refused, what is replaced, what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusecli.errors import UsageError
from fusecli.int8.flow import fix, observers, prepare
from fusecli.int8.packed import packed
from fusecli.int8.quantize import plan, quantize
from fusecli.int8.units import Options
from fusecli.sample import Sample
from tests.int8.nets import Pair, built


def samples(*shape, count=3):
    return [Sample((torch.randn(*shape),)) for _ in range(count)]


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def test_the_model_and_the_batches_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    batches = samples(2, 3, 5, 5)
    copies = [sample.args[0].clone() for sample in batches]
    done = quantize(model, batches)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.requires_grad for tensor in model.parameters())
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameters[name] is tensor for name, tensor in model.named_parameters())
    assert all(torch.equal(sample.args[0], copy) for sample, copy in zip(batches, copies, strict=True))
    assert not done.model.state_dict()["_frozen_param0"].is_floating_point()
    assert not model._forward_hooks


def test_ticks():
    said: list[str] = []
    quantize(two(), samples(2, 4), progress=said.append)
    assert said == ["exporting", *(f"calibrating, batch {n} of 3" for n in (1, 2, 3)), "converting"]


def test_nothing_float_is_kept_of_a_quantized_weight():
    done = quantize(two(), samples(2, 4))
    floats = {name for name, tensor in done.model.state_dict().items() if tensor.is_floating_point()}
    assert floats == {"0.bias", "2.bias", "_scale_0", "_scale_1"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("observer", ["minmax", "histogram"])
def test_an_activation_that_is_not_finite_is_named(observer, value):
    model = two()
    model[0].bias.data[2] = value
    with pytest.raises(UsageError, match=r"^0\.output: calibration met a value that is not finite") as raised:
        quantize(model, samples(2, 4), Options(observer=observer))
    assert "\n" not in str(raised.value)


def test_a_weight_that_is_not_finite_is_named():
    model = two()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"^2\.weight: calibration met"):
        quantize(model, samples(2, 4))


def test_a_value_that_no_batch_has_is_named():
    with pytest.raises(UsageError, match=r"^x\.output: calibration never saw"):
        quantize(built("Linear"), samples(0, 7))


def test_no_batches():
    with pytest.raises(UsageError, match="there is no calibration batch"):
        quantize(two(), [])


def test_batches_of_other_sizes():
    batches = [*samples(2, 3, 6, 6, count=1), *samples(2, 3, 7, 6, count=1)]
    with pytest.raises(UsageError, match="batch 2: its sizes do not fit"):
        quantize(built("Conv"), batches)


def test_nothing_to_quantize():
    with pytest.raises(UsageError, match=r"nothing in the model can be quantized; .*no integer form of gelu"):
        quantize(nn.GELU().eval(), samples(2, 3))


@pytest.mark.parametrize("observer", ["minmax", "histogram"])
def test_a_learned_activation_is_exact(observer):
    planned = plan(two(), samples(2, 4)[0])
    prepared = prepare(planned.exported.module, planned.units, Options(observer=observer))
    (_, (value, seen), *_) = ((node, each) for node, each in observers(prepared) if node.op != "get_attr")
    seen(torch.randn(8, 5))
    for scale, zero_point in ((0.0371, 77), (1e-3, 0), (3.3e-7, 255), (1.7, 13), (0.1, 128)):
        fix(value, seen, torch.tensor(scale), torch.tensor(zero_point), "it")
        assert torch.equal(seen.calculate_qparams()[0], torch.tensor([scale]))
        assert torch.equal(seen.calculate_qparams()[1], torch.tensor([zero_point]))


def test_learned_scales_replace_calibrated_ones_and_no_others():
    known = {"0.output": (torch.tensor(0.0371), torch.tensor(77))}
    done = quantize(two(), samples(2, 4), known=known)
    tensors, _ = packed(done)
    assert done.notes == ()
    assert (tensors["0.output.scale"], tensors["0.output.zero_point"]) == (torch.tensor(0.0371), 77)
    assert tensors["2.output.scale"] != tensors["0.output.scale"]


def test_a_learned_activation_goes_by_the_module_behind_the_layer_too():
    tensors, _ = packed(
        quantize(two(), samples(2, 4), known={"1.output": (torch.tensor([0.5]), torch.tensor([3]))})
    )
    assert (tensors["0.output.scale"], tensors["0.output.zero_point"]) == (0.5, 3)


def test_a_learned_weight_is_exact():
    model, scale = two(), torch.rand(5) / 100 + 1e-3
    known = {"0.weight": (scale, torch.zeros(5, dtype=torch.int32))}
    tensors, _ = packed(quantize(model, samples(2, 4), known=known))
    assert torch.equal(tensors["0.weight.scale"], scale)
    integers = torch.round(model[0].weight.double() / scale.double()[:, None]).clamp(-127, 127)
    assert torch.equal(tensors["0.weight"].double(), integers)


def test_values_of_one_scale_take_the_learned_one_together():
    model = built("Pools")
    done = quantize(
        model, samples(*model.SHAPE), known={"conv.output": (torch.tensor(0.25), torch.tensor(9))}
    )
    tensors, _ = packed(done)
    assert {tensors[f"{unit.name}.output.scale"].item() for unit in done.units} == {0.25}


def test_a_learned_scale_of_nothing_is_a_note():
    known = {"nowhere.output": (torch.tensor(0.5), torch.tensor(3))}
    notes = quantize(two(), samples(2, 4), known=known).notes
    assert notes == ("the learned scale of nowhere.output is not used: it is no quantized value",)


@pytest.mark.parametrize(
    ("name", "scale", "zero_point"),
    [
        ("0.weight", torch.rand(4) + 1, torch.zeros(4)),
        ("0.output", torch.tensor([1.0, 2.0]), torch.tensor([0, 0])),
        ("0.output", torch.tensor(0.0), torch.tensor(0)),
        ("0.output", torch.tensor(float("nan")), torch.tensor(0)),
        ("0.output", torch.tensor(0.5), torch.tensor(256)),
    ],
)
def test_a_learned_scale_that_cannot_be_one_is_refused(name, scale, zero_point):
    with pytest.raises(UsageError, match=f"{name}: these are no scale and zero point of it"):
        quantize(two(), samples(2, 4), known={name: (scale, zero_point)})


def test_arguments_by_name():
    class Sum(Pair):
        def forward(self, x, *, other):
            return self.a(x) + self.b(other)

    batches = [Sample((torch.randn(2, 3, 6, 6),), {"other": torch.randn(2, 3, 6, 6)}) for _ in range(3)]
    model = Sum().eval()
    done = quantize(model, batches)
    x, other = torch.randn(5, 3, 6, 6), torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        found, wanted = done.model(x, other=other), model(x, other=other)
    assert (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()
