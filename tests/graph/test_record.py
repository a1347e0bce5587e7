"""One run on a copy, with its numbers, and nothing is left behind."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusecli.errors import UsageError
from fusecli.graph.record import Run
from fusecli.sample import Sample
from tests import nets
from tests.graph.conftest import folds, left, recorded, run_of

X = nets.images(2, 3, 5, 5)


class Behind(nn.Module):
    """conv -> bn -> `then`."""

    def __init__(self, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.then = then

    def forward(self, x: Tensor) -> Any:
        return self.then(self.bn(self.conv(x)))


@pytest.mark.parametrize(
    "then",
    [
        lambda y: y * y.sum().item(),
        lambda y: y[y > 0],
        lambda y: y.nonzero(),
        lambda y: y if y.sum() > 0 else -y,
        lambda y: y.numpy(),
        lambda y: [y] * int(y.argmax() + 1),
        lambda y: y.unique(),
    ],
    ids=["item", "mask", "nonzero", "if", "numpy", "int", "unique"],
)
def test_what_depends_on_numbers_is_run_on_numbers(then: Callable[[Tensor], Any]) -> None:
    net = nets.randomise(Behind(then), 0)
    assert folds(net, X) == [("conv", "bn")]


def test_a_structure_without_numbers_will_do() -> None:
    net = nets.randomise(Behind(torch.sigmoid), 0)
    run = Run(copy.deepcopy(net).to("meta"), Sample((X,)), lambda: copy.deepcopy(net))
    assert run.recording.calls == recorded(net, X).calls


def test_a_half_precision_model_runs_on_float32_inputs() -> None:
    net = nets.conv_bn().to(torch.bfloat16)
    assert folds(net, X) == [("conv", "bn")]
    assert net.conv.weight.dtype == torch.bfloat16


def test_random_numbers_are_no_obstacle() -> None:
    net = nets.randomise(Behind(lambda y: y + torch.rand_like(y) + random.random() + np.random.rand()), 0)
    assert folds(net, X) == [("conv", "bn")]


class Caches(nn.Module):
    """Makes what it adds at its first call, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.cache: dict[str, Tensor] = {}
        self.shape: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if "bias" not in self.cache:
            self.cache["bias"] = torch.arange(y.shape[-1], dtype=y.dtype)
            self.mask = torch.ones_like(y)
            self.register_buffer("late", torch.zeros(1))
        return y * self.mask + self.cache["bias"]


def test_a_cache_stays_in_the_copy() -> None:
    net = nets.randomise(Caches(), 0)
    assert folds(net, X) == [("conv", "bn")]
    assert (net.cache, hasattr(net, "mask"), hasattr(net, "late")) == ({}, False, False)
    net(X)
    assert folds(net, X) == [("conv", "bn")]
    assert net(X).shape == (2, 4, 3, 3)


class Spoils(nn.Module):
    """Changes whatever a forward can change of its model, and of the world."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop = nn.Dropout()
        self.calls = 0
        self.seen: list[Any] = []
        self.fails = fails
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        self.steps += 1
        self.conv.weight.data.zero_()
        torch.rand(3)
        random.random()
        np.random.rand()
        x.zero_()
        self.extra = nn.Linear(2, 2)
        if self.fails:
            raise RuntimeError("no such luck")
        return self.drop(self.bn(self.conv(x)))


def state(net: nn.Module) -> list[Any]:
    hooks = [
        (path, sorted(name for name, held in vars(module).items() if "hook" in name and held))
        for path, module in net.named_modules()
    ]
    flags = [(path, module.training) for path, module in net.named_modules()]
    return [
        hooks,
        flags,
        net.calls,
        net.seen,
        sorted(vars(net)),
        random.getstate(),
        str(np.random.get_state()),
    ]


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_a_run_leaves_everything_as_it_was(fails: bool) -> None:
    net = nets.randomise(Spoils(fails), 0)
    net.train()
    net.bn.eval()
    x = X.clone()
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    before, generator = state(net), torch.get_rng_state()
    if fails:
        with pytest.raises(UsageError, match="does not run on these inputs: RuntimeError: no such luck"):
            recorded(net, x)
    else:
        recorded(net, x)
    assert state(net) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(x, X)


def test_the_inputs_do_not_fit() -> None:
    with pytest.raises(UsageError, match="expected input") as slip:
        recorded(nets.conv_bn(), nets.images(2, 5, 5, 5))
    assert slip.value.problems[0].where == "inputs"


def test_a_run_is_in_eval_mode_whatever_the_model_is_in() -> None:
    net = nets.conv_bn().train()
    (call,) = [call for call in recorded(net, X).calls if call.name == "aten.native_batch_norm"]
    assert call.args[5] is False
    assert net.training


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_shows_the_same_ops(inside: bool) -> None:
    """There, composite ops are not taken apart by torch itself."""

    class Infers(Behind):
        def forward(self, x: Tensor) -> Any:
            with torch.inference_mode() if inside else nullcontext():
                return super().forward(x)

    net = nets.randomise(Infers(nn.Dropout()), 0)
    with nullcontext() if inside else torch.inference_mode():
        names = {call.name for call in recorded(net, X).calls}
        assert folds(net, X) == [("conv", "bn")]
    assert {"aten.convolution", "aten._native_batch_norm_legit_no_training"} <= names
    assert not {"aten.conv2d", "aten.batch_norm", "aten.dropout"} & names


def test_a_weight_that_a_hook_computes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use all the same
        net = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).eval()
    assert left(net, X) == {"1": "parametrized"}


@pytest.mark.parametrize("blind", [True, False])
def test_a_bias_that_nobody_reads(blind: bool) -> None:
    conv = nets.BiasBlindConv2d if blind else nets.SamePadConv2d
    net = nets.chain(conv=conv(3, 4, 3, bias=False), bn=nn.BatchNorm2d(4))
    assert left(net, X) == ({"bn": "bias-not-read"} if blind else {})
    assert folds(net, X) == ([] if blind else [("conv", "bn")])
    assert net.conv.bias is None


def test_a_bias_that_is_there_and_not_read() -> None:
    net = nets.chain(conv=nets.BiasBlindConv2d(3, 4, 3, bias=True), bn=nn.BatchNorm2d(4))
    assert left(net, X) == {"bn": "bias-not-read"}


def test_zero_biases_of_a_probe() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 4, 3, bias=False), bn=nn.BatchNorm2d(4))
    run = run_of(net, X)
    assert run.recording.named("conv.bias") is None
    probed = run.with_biases(["conv"])
    assert probed.named("conv.bias").shape == (4,)  # type: ignore[union-attr]
    assert net.conv.bias is None
