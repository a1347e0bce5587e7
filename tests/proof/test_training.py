"""The check in train mode: what it sees, what it cannot see, and that it says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusecli.outcome import Judgement
from fusecli.proof.training import judge_training
from fusecli.sample import Sample
from tests import nets

X = Sample.of(nets.images(6, 3, 8, 8))


def judged(original: nn.Module, fused: nn.Module, sample: Sample = X) -> Any:
    return judge_training(copy.deepcopy(original).double(), fused.double(), lambda name: name, [sample], 0)


def model() -> Any:
    return nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), drop=nn.Dropout(), relu=nn.ReLU())


def test_the_same_model_trains_as_it_does() -> None:
    found = judged(model(), model())
    assert (found.judgement, found.steps, found.difference.error) == (Judgement.EQUIVALENT, 2, 0.0)


def _momentum(net: Any) -> None:
    net.bn.momentum = 0.2


def _eps(net: Any) -> None:
    net.bn.eps = 1e-4


def _mode(net: Any) -> None:
    net.bn.train = lambda mode=True: net.bn  # stays in eval mode


def _frozen(net: Any) -> None:
    net.conv.weight.requires_grad_(False)


def _dropout_first(net: Any) -> None:
    net.bn, net.drop = net.drop, net.bn


def _mean(net: Any) -> None:
    net.bn.running_mean += 1e-3  # no output in train mode depends on it


@pytest.mark.parametrize("change", [_momentum, _eps, _mode, _frozen, _mean], ids=lambda f: f.__name__)
def test_what_eval_mode_may_not_show_is_seen(change: Any) -> None:
    fused = model()
    change(fused)
    found = judged(model(), fused)
    assert found.judgement is Judgement.DIFFERENT
    assert "differs" in found.said


def test_a_dropout_that_moved_behind_the_norm_is_seen() -> None:
    fused = model()
    _dropout_first(fused)
    names = {"bn": "drop", "drop": "bn"}

    def renamed(name: str) -> str:
        path, _, local = name.partition(".")
        return f"{names.get(path, path)}.{local}"

    found = judge_training(model().double(), fused.double(), renamed, [X], 0)
    assert found.judgement is Judgement.DIFFERENT


def test_a_batch_of_one_value_is_a_doubt() -> None:
    linear = nets.chain(linear=nn.Linear(3, 6), bn=nn.BatchNorm1d(6))
    found = judged(linear, copy.deepcopy(linear), Sample.of(torch.zeros(1, 3)))
    assert found.judgement is Judgement.INCONCLUSIVE
    assert "does not train on these inputs: ValueError: Expected more than 1 value" in found.said


class Labels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(1)


def test_a_model_without_gradients_is_a_doubt() -> None:
    found = judged(Labels(), Labels())
    assert found.judgement is Judgement.INCONCLUSIVE
    assert "no gradient reaches the output" in found.said


def test_a_fused_model_that_raises_is_different() -> None:
    fused = model()
    fused.relu = nn.Linear(3, 3)
    found = judged(model(), fused)
    assert found.judgement is Judgement.DIFFERENT
    assert "the fused model raises" in found.said


class Remembers(nn.Module):
    """Keeps the mean of what the convolution gives, in a buffer that no state dict holds."""

    def __init__(self, *, of_norm: bool) -> None:
        super().__init__()
        self.net, self.of_norm = model(), of_norm
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net.conv(x)
        z = self.net.bn(y)
        if self.training:
            self.seen = (z if self.of_norm else y).detach().mean()
        return z  # type: ignore[no-any-return]


def test_a_buffer_that_no_state_dict_holds_is_seen() -> None:
    found = judged(Remembers(of_norm=False), Remembers(of_norm=True))
    assert (found.judgement, found.difference.where) == (Judgement.DIFFERENT, "seen")
    assert judged(Remembers(of_norm=True), Remembers(of_norm=True)).judgement is Judgement.EQUIVALENT


def test_what_no_name_tells_shows_afterwards() -> None:
    """As of what a custom fuser made: its tensors have names of their own."""
    fused = model()
    _momentum(fused)
    found = judge_training(model().double(), fused.double(), lambda _: None, [X], 0)
    assert (found.judgement, "in eval mode afterwards" in found.said) == (Judgement.DIFFERENT, True)
    same = judge_training(model().double(), model().double(), lambda _: None, [X], 0)
    assert same.judgement is Judgement.EQUIVALENT
