"""Who reads a value: whatever the code does with an activation, it shows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fusecli.graph.memory import same_memory
from fusecli.graph.sites import layer_sites, strangers
from tests import nets
from tests.graph.conftest import folds, left, readers, recorded
from tests.torchscript import scripted

X = nets.images(2, 3, 5, 5)
NORM = "aten.native_batch_norm in bn"


class Watched(nn.Module):
    """conv -> bn, and `look` at what is between them, after the norm has read it."""

    def __init__(self, look: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.look = look
        self.feats: list[Tensor] = []
        self.register_buffer("memory", torch.zeros(2, 4, 3, 3))

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.bn(y), self.look(self, y)


@dataclass
class Boxed:
    tensor: Tensor


class Opaque:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def assign(name: str) -> Callable[[Any, Tensor], None]:
    return lambda net, y: setattr(net, name, y)


def cut(net: Any, y: Tensor) -> Tensor:
    y[:, 0] = 0
    return y.sum()


def into_out(net: Any, y: Tensor) -> Tensor:
    return torch.mul(y, 2, out=torch.empty_like(y))


def foreach(net: Any, y: Tensor) -> Tensor:
    torch._foreach_add_([y], 1.0)
    return y.mean()


def handed_on(net: Any, y: Tensor) -> Tensor:
    return torch.from_numpy(y.numpy().copy())


LOOKS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "data": (lambda net, y: y.data.mean(), "aten.mean in the model's forward"),
    "detach": (lambda net, y: y.detach().mean(), "aten.mean in the model's forward"),
    "numpy": (lambda net, y: float(y.numpy().sum()), "Tensor.numpy in the model's forward"),
    "asarray": (lambda net, y: float(np.asarray(y).sum()), "Tensor.__array__ in the model's forward"),
    "from numpy": (handed_on, "Tensor.numpy in the model's forward"),
    "tolist": (lambda net, y: y.tolist(), "Tensor.tolist in the model's forward"),
    "item": (lambda net, y: y.sum().item(), "aten.sum in the model's forward"),
    "truth": (lambda net, y: bool((y > 0).any()), "aten.gt in the model's forward"),
    "pickle": (lambda net, y: len(pickle.dumps(y)), "Tensor.untyped_storage in the model's forward"),
    "copy": (lambda net, y: copy.copy(y), "Tensor."),
    "deepcopy": (lambda net, y: copy.deepcopy(y), "Tensor.__deepcopy__ in the model's forward"),
    "storage": (
        lambda net, y: torch.empty(0).set_(y.untyped_storage()),
        "Tensor.untyped_storage in the model's forward",
    ),
    "part overwritten": (cut, "aten.fill_ through another view in the model's forward"),
    # Nobody reads the result, but once the norm is an identity its output is the same memory.
    "spoilt": (lambda net, y: (y.add_(1), None)[1], "aten.add_ in the model's forward"),
    "added to": (lambda net, y: y.add_(1), "aten.add_ in the model's forward"),
    "view added to": (lambda net, y: y.view(-1).add_(1), "aten.view in the model's forward"),
    "out": (into_out, "aten.mul in the model's forward"),
    "foreach": (foreach, "aten._foreach_add_ in the model's forward"),
    "attribute": (assign("feat"), "kept after the run as feat"),
    "buffer replaced": (assign("memory"), "kept after the run as memory"),
    "list": (lambda net, y: net.feats.append(y), "kept after the run as feats"),
    "buffer": (lambda net, y: net.memory.copy_(y), "aten.copy_ in the model's forward"),
    "output": (lambda net, y: y, "the model's output"),
    "output in a dict": (lambda net, y: {"a": [y]}, "the model's output"),
    "output in a dataclass": (lambda net, y: Boxed(y), "the model's output"),
    "output in an object": (lambda net, y: Opaque(y), "kept after the run by "),
}


@pytest.mark.parametrize("name", LOOKS)
def test_whatever_looks_at_a_value_reads_it(name: str) -> None:
    look, reader = LOOKS[name]
    net = nets.randomise(Watched(look), 0)
    found = readers(recorded(net, X), "conv")
    assert found[0] == NORM
    assert any(described.startswith(reader) for described in found[1:]), found
    assert left(net, X) == {"bn": "multiple-consumers"}


@pytest.mark.parametrize(
    "look",
    [
        lambda net, y: None,
        lambda net, y: (y.mean(), None)[1],
        lambda net, y: (y.detach().view(-1), None)[1],
        lambda net, y: y.shape,
        lambda net, y: torch.zeros_like(y[:0]).numel(),
    ],
    ids=["nothing", "thrown away", "view thrown away", "shape", "empty"],
)
def test_what_comes_to_nothing_reads_nothing(look: Callable[[Any, Tensor], Any]) -> None:
    net = nets.randomise(Watched(look), 0)
    assert readers(recorded(net, X), "conv") == [NORM]
    assert folds(net, X) == [("conv", "bn")]


def test_the_norm_reads_the_version_that_a_write_has_left() -> None:
    class Overwritten(Watched):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y[:, 0] = 0
            return self.bn(y)

    net = nets.randomise(Overwritten(lambda *_: None), 0)
    recording = recorded(net, X)
    (norm,) = [call for call in recording.calls if call.name == "aten.native_batch_norm"]
    (site,) = layer_sites(recording, "conv")
    assert norm.reads[0] != site.exit
    assert recording.maker(norm.reads[0]).name.startswith("aten.fill_")  # type: ignore[union-attr]
    assert left(net, X) == {"bn": "no-linear-producer"}


def test_memory_that_is_used_again_is_another_storage() -> None:
    class Frees(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(50):
                x = x * 2  # the tensor before is freed, and its memory is given out again
            return x

    recording = recorded(Frees(), torch.ones(64))
    products = [call for call in recording.calls if call.name == "aten.mul"]
    assert len({call.makes for call in products}) == 50
    assert [call.reads[0] for call in products[1:]] == [call.makes[0] for call in products[:-1]]


def test_hooks_of_the_user_read() -> None:
    kept: list[Any] = []
    net = nets.conv_bn()
    handle = net.conv.register_forward_hook(lambda module, args, output: kept.append(output))
    assert "kept after the run by a hook" in readers(recorded(net, X), "conv")[1]
    assert left(net, X) == {"bn": "multiple-consumers"}
    assert {type(tensor) for tensor in kept} == {Tensor}
    handle.remove()
    net.conv.register_forward_hook(lambda module, args, output: kept.append(float(output.sum())))
    assert readers(recorded(net, X), "conv")[0] == "aten.sum in the model's forward"
    assert left(net, X) == {"bn": "multiple-consumers"}


def test_a_hook_that_only_looks_reads_nothing() -> None:
    shapes: list[Any] = []
    net = nets.conv_bn()
    net.conv.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    recording = recorded(net, X)
    assert readers(recording, "conv") == [NORM]
    assert folds(net, X) == [("conv", "bn")]


# --- whose weight it is


class Reads(nn.Module):
    """Applies the weight of `conv` without calling it, as `how` hands it over."""

    def __init__(self, how: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).sum() + F.conv2d(x, self.how(self.conv.weight)).sum()


@pytest.mark.parametrize(
    "how",
    [
        lambda w: w,
        lambda w: w.data,
        lambda w: w.detach(),
        lambda w: w.transpose(2, 3),
        lambda w: w.flatten(1).t().t().view(4, 3, 3, 3),
        lambda w: w.unsqueeze(0).expand(2, -1, -1, -1, -1).reshape(8, 3, 3, 3),
        lambda w: w.contiguous().clone(),
        lambda w: w.double().float(),
    ],
    ids=["itself", "data", "detach", "transpose", "t and view", "expand", "clone", "cast"],
)
def test_a_weight_is_known_by_what_it_is(how: Callable[[Tensor], Tensor]) -> None:
    recording = recorded(Reads(how), X)
    assert [recording.described(call) for call in strangers(recording, "conv")] == [
        "aten.convolution in the model's forward"
    ]


@pytest.mark.parametrize("own", [True, False], ids=["called too", "never called"])
def test_a_weight_that_a_function_applies(own: bool) -> None:
    class Applies(Watched):
        def forward(self, x: Tensor) -> Any:
            y = F.conv2d(x, self.conv.weight, self.conv.bias)
            return self.bn(y), self.conv(x) if own else None

    net = nets.randomise(Applies(lambda *_: None), 0)
    assert left(net, X) == {"bn": "shared-weight" if own else "functional-layer"}


def test_one_parameter_under_two_names() -> None:
    net = nets.two_pairs()
    net.conv2 = nn.Conv2d(6, 6, 3)
    net.bn2 = nn.BatchNorm2d(6)
    net.add_module("conv3", nn.Conv2d(6, 6, 3))
    net.conv3.weight = net.conv2.weight
    recording = recorded(net.eval(), nets.images(1, 3, 9, 9))
    assert recording.aliases == (frozenset({"conv2.weight", "conv3.weight"}),)
    assert recording.named("conv2.weight") is recording.named("conv3.weight") is not None
    assert left(net, nets.images(1, 3, 9, 9)) == {"bn2": "tied-weights"}


def test_two_parameters_on_one_memory() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 3, 3), bn=nn.BatchNorm2d(3), other=nn.Conv2d(3, 3, 3))
    net.other.weight = nn.Parameter(net.conv.weight.data)
    assert same_memory(net) == (frozenset({"conv.weight", "other.weight"}),)
    assert recorded(net, X).aliases == same_memory(net)
    assert left(net, X) == {"bn": "tied-weights"}


def test_parts_of_one_storage_are_not_the_same_memory() -> None:
    flat = torch.zeros(2, 4)
    net = nn.Module()
    net.a, net.b = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    net.c = nn.Parameter(flat.view(-1)[3:5])
    assert same_memory(net) == (frozenset({"a", "b", "c"}),)
    del net.c
    assert same_memory(net) == ()


# --- a linear layer is not one op


def dense(inputs: int, outputs: int, **options: Any) -> Any:
    return nets.chain(fc=nn.Linear(inputs, outputs, **options), bn=nn.BatchNorm1d(outputs))


@pytest.mark.parametrize(
    ("shape", "transposed", "bias", "op"),
    [
        ((5, 3), False, True, "aten.addmm"),
        ((5, 3), False, False, "aten.mm"),
        ((2, 5, 3), False, True, "aten.addmm"),
        ((2, 5, 3), False, False, "aten.mm"),
        ((2, 3, 5), True, True, "aten.bmm"),
        ((2, 3, 5), True, False, "aten.bmm"),
        ((3,), False, True, "aten.addmm"),
        ((2, 2, 2, 3), False, True, "aten.addmm"),
    ],
)
def test_a_linear_layer_has_one_site(shape: tuple[int, ...], transposed: bool, bias: bool, op: str) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.transpose(1, 2) if transposed else x)

    # A frozen weight on a transposed tensor is expanded to a bmm; one with gradients is not.
    recording = recorded(Turned().requires_grad_(not transposed), nets.images(*shape))
    (site,) = layer_sites(recording, "fc")
    (number,) = site.calls
    assert (recording.calls[number].name, site.visit) == (op, 0)
    assert site.entry is not None
    assert recording.values[site.exit or 0].shape[-1] == 4


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_its_norm_fold(bias: bool) -> None:
    assert folds(dense(3, 4, bias=bias), nets.images(5, 3)) == [("fc", "bn")]


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_over_positions_is_on_the_wrong_axis(bias: bool) -> None:
    assert left(dense(3, 4, bias=bias), nets.images(2, 4, 3)) == {"bn": "bn-axis"}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_norm_on_the_last_axis_folds(frozen: bool) -> None:
    """(n, c, l) -> (n, l, c) for the layer, (n, c, l) for the norm: a bmm and an addition if frozen."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(3, 5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.fc(x.transpose(1, 2)).transpose(1, 2))

    net = nets.randomise(Turned(), 0).requires_grad_(not frozen)
    assert folds(net, nets.images(2, 3, 5)) == [("fc", "bn")]


# --- constants


class Makes(nn.Module):
    """Returns what `make` makes of its one parameter and its input."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(self.weight, x)


@pytest.mark.parametrize(
    ("make", "constant"),
    [
        (lambda w, x: w.exp() * 2 + 1, True),
        (lambda w, x: w + torch.arange(3), True),
        (lambda w, x: w + torch.full((3,), 0.5), True),
        (lambda w, x: w + x, False),
        (lambda w, x: w + torch.rand(3), False),
        (lambda w, x: w + torch.empty(3).normal_(), False),
        (lambda w, x: F.dropout(w, 0.5), False),
        (lambda w, x: w + torch.from_numpy(x.numpy()), False),
        (lambda w, x: w.clone().copy_(x), False),
    ],
    ids=["of the weight", "arange", "full", "input", "rand", "normal_", "dropout", "numpy", "copy_"],
)
def test_what_is_constant(make: Callable[[Tensor, Tensor], Tensor], constant: bool) -> None:
    recording = recorded(Makes(make), torch.ones(3))
    made = recording.calls[-1].reads[0]
    assert recording.values[made].constant is constant
    if constant:
        assert recording.values[made].origins == {"weight"}


# --- what forward writes


def test_what_forward_writes_is_known() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("kept", torch.zeros(3))
            self.scale = nn.Parameter(torch.ones(3))
            self.shift = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.scale.data.view(3).mul_(2)
            return x * self.scale + self.shift + self.kept

    model = Counts()
    assert recorded(model, torch.ones(3)).written == {"calls", "scale"}
    assert (float(model.calls), model.scale.tolist()) == (0, [1, 1, 1])


def test_a_norm_whose_statistics_are_written_stays() -> None:
    class Drifts(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            self.running_mean.mul_(0.9)  # type: ignore[union-attr]
            return super().forward(x)

    net = nets.chain(conv=nn.Conv2d(3, 4, 3), bn=Drifts(4))
    assert left(net, X) == {"bn": "written-in-forward"}


# --- calls of modules


def test_turns_of_a_module_that_is_called_again() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.bn(self.conv(x)).relu()
            return x

    net = nets.randomise(Loops(), 0)
    recording = recorded(net, X)
    assert [site.visit for site in layer_sites(recording, "conv")] == [0, 1, 2]
    assert [recording.turns[visit.number] for visit in recording.visits_of("bn")] == [0, 1, 2]
    assert folds(net, X) == [("conv", "bn")]


def test_a_module_under_two_names_is_one() -> None:
    twice = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    twice.add_module("2", twice[0])
    recording = recorded(twice.eval(), X)
    assert recording.names["0"] == ("0", "2")
    assert recording.visits_of("2") == recording.visits_of("0")
    assert len(recording.visits_of("2")) == 2
    assert left(twice, X) == {"1": "shared-module"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant: bool) -> None:
    class Saves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nets.conv_bn()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=reentrant)

    net = nets.randomise(Saves(), 0)
    assert folds(net, X) == [("block.conv", "block.bn")]


def _swish(y: Tensor) -> Tensor:
    return torch.sigmoid(y) * y


def test_a_scripted_function_reads() -> None:
    swish = scripted(_swish)
    net = nets.randomise(Watched(lambda net, y: swish(y)), 0)
    assert len(readers(recorded(net, X), "conv")) > 1
    assert left(net, X) == {"bn": "multiple-consumers"}


def test_a_scripted_function_behind_the_norm_does_not_matter() -> None:
    swish = scripted(_swish)

    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return swish(x)

    net = nets.chain(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), act=Swish())
    assert folds(net, X) == [("conv", "bn")]
