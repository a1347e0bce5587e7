"""What stays float, and the reason that is given for it; what a unit says about itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fusecli.int8.quantize import plan, quantize
from fusecli.int8.units import QuantUnit
from fusecli.sample import Sample


class Net(nn.Module):
    """A convolution, and after it what a test is about."""

    def __init__(self, then=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.after = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.table = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.then = then or (lambda net, y: y)

    def forward(self, x):
        return self.then(self, self.conv(x))


def planned(then):
    return plan(Net(then).eval(), Sample((torch.randn(2, 3, 6, 6),)))


REFUSED = {
    "norm": (lambda net, y: net.norm(y), "was not folded"),
    "silu": (lambda net, y: F.silu(y), "no integer form of silu"),
    "softmax": (lambda net, y: y.softmax(1), "no integer form of softmax"),
    "number": (lambda net, y: y + 1, "a number"),
    "parameter": (lambda net, y: y * net.table, "is a constant of the model"),
    "alpha": (lambda net, y: torch.add(y, y, alpha=2), "alpha"),
    "double": (lambda net, y: y.double() + y.double(), "is float64"),
    "pad": (lambda net, y: F.pad(y, (1, 1), value=1.0), "values that its input does not have"),
    "pool": (lambda net, y: F.max_pool2d(F.gelu(y), 2), "its input is not quantized"),
    "weight": (lambda net, y: F.conv2d(y, net.after.weight * 2), "computed in the run"),
    "tied": (lambda net, y: net.after(y) * net.after.weight.sum(), "also read by sum"),
    "input": (lambda net, y: F.conv2d(net.table, net.after.weight) + y, "is a constant of the model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_float_says_why(name):
    then, reason = REFUSED[name]
    found = planned(then)
    assert found.units[0].kind == "conv2d"
    assert any(reason in left.reason for left in found.left), found.left


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_float_is_float(name):
    model = Net(REFUSED[name][0]).eval()
    samples = [Sample((torch.randn(2, 3, 6, 6),)) for _ in range(3)]
    done = quantize(model, samples)
    with torch.no_grad():
        found, wanted = done.model(*samples[0].args), model(*samples[0].args)
    assert found.dtype == wanted.dtype
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    targets = [str(node.target) for node in done.model.graph.nodes]
    assert all(left.op in " ".join(targets) for left in done.left)


def test_a_norm_is_not_folded_behind_our_back():
    """torchao would fold it, and so change what the other reader of the layer gets."""
    model = Net(lambda net, y: net.norm(y) + y).eval()
    nn.init.uniform_(model.norm.weight, 3, 4)
    samples = [Sample((torch.randn(2, 3, 6, 6),)) for _ in range(3)]
    done = quantize(model, samples)
    assert [left.module for left in done.left] == ["norm"]
    with torch.no_grad():
        found, wanted = done.model(*samples[0].args), model(*samples[0].args)
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_a_computed_weight_stays_float():
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)).eval()
    found = plan(model, Sample((torch.randn(2, 3),)))
    assert [unit.name for unit in found.units] == ["1"]
    assert "computed in the run" in found.left[-1].reason


def test_embeddings_and_integers_are_left():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).eval()
    found = plan(model, Sample((torch.tensor([[1, 2], [3, 4]]),)))
    assert [(left.module, left.op) for left in found.left] == [("0", "aten.embedding")]
    assert [unit.kind for unit in found.units] == ["linear"]


def test_a_unit_names_its_modules_and_nodes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten()).eval()
    conv, pool, dropout, flatten = plan(model, Sample((torch.randn(2, 3, 6, 6),))).units
    assert conv == QuantUnit("0", ("0", "1"), ("conv2d", "relu6"), "relu6", "0.weight", "conv2d+relu6")
    assert pool == QuantUnit("2", ("2",), ("max_pool2d",), "max_pool2d", None, "max_pool2d", follows=True)
    assert (dropout.follows, flatten.follows) == (True, True)


def test_an_activation_with_another_reader_is_a_unit_of_its_own():
    units = planned(lambda net, y: F.relu(y) + y).units
    assert [unit.kind for unit in units] == ["conv2d", "relu", "add"]
    units = planned(lambda net, y: F.relu(net.after(F.relu(y)))).units
    assert [unit.kind for unit in units] == ["conv2d+relu", "conv2d+relu"]


def test_a_name_means_one_value():
    """A path of a module that is also the name of another node, or of two units, names nothing."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.add = nn.Linear(4, 4)
            self.linear = nn.Linear(4, 4)
            self.again = nn.Linear(4, 4)

        def forward(self, x):
            x = self.again(self.again(x))
            return self.linear(self.add(x)) + x

    names = [unit.name for unit in plan(Twice().eval(), Sample((torch.randn(2, 4),))).units]
    assert names == ["linear", "linear_1", "linear_2", "linear_3", "add"]
