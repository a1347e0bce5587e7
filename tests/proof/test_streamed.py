"""Models that are run with their weights brought when an op reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecli
from fusecli.graph.followers import widened
from fusecli.outcome import Judgement
from fusecli.proof import whole
from fusecli.proof.run import run
from fusecli.proof.streamed import Kept, streamed
from fusecli.sample import Sample
from tests.nets import images, randomise
from tests.proof.nets import X, bn, changed, conv, fused, net, right_fold, verdict

ROWS = images(2, 5, 8)


class Attending(nn.Module):
    """nn.MultiheadAttention reads the weight of its out_proj, which it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x)[0]
        return y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight
        self.listed = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x)) + F.linear(x, self.listed[0].t()) * self.first.weight.shape[0]
        return y.to(self.first.weight.device, self.first.weight.dtype)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("room", [0, 2**20])
@pytest.mark.parametrize("make", [Attending, Recurrent, Tied, Normed])
def test_it_computes_what_the_model_does(make: type[nn.Module], room: int) -> None:
    model = randomise(make(), 0)
    twin, weights = streamed(model, {}, kept=Kept(room))
    assert all(parameter.is_meta for parameter in twin.parameters())
    with weights:
        given = run(twin, Sample((ROWS,)), seed=0, dtype=torch.float64)
    expected = run(widened(model), Sample((ROWS,)), seed=0, dtype=torch.float64)
    assert given.dtype is torch.float64
    assert torch.equal(given, expected)


def test_other_tensors_by_name_take_the_places() -> None:
    model = nn.Linear(8, 4)
    exact = model.weight.detach().double() + 1e-9
    twin, weights = streamed(model, {"weight": lambda: exact}, kept=Kept())
    with weights:
        given = twin(ROWS.double())
    assert torch.equal(given, F.linear(ROWS.double(), exact, model.bias.detach().double()))


def test_what_was_used_last_is_kept_as_far_as_there_is_room() -> None:
    kept = Kept(room=2 * 8 * 4)
    a, b, c = (torch.full((4,), float(number), dtype=torch.float64) for number in range(3))
    kept.put("a", a)
    kept.put("b", b)
    assert kept.get("a") is a
    kept.put("c", c)
    assert (kept.get("a") is a, kept.get("b"), kept.get("c") is c) == (True, None, True)


def test_what_is_kept_anew_takes_no_more_room() -> None:
    kept = Kept(room=2 * 8 * 4)
    a, b = (torch.full((4,), float(number), dtype=torch.float64) for number in range(2))
    for _ in range(3):
        kept.put("a", a)
    kept.put("b", b)
    assert kept.get("a") is a


@pytest.mark.parametrize("make", [Attending, Recurrent, Tied, Normed])
def test_no_weight_is_widened_but_those_that_are_read(
    make: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "in_full", lambda *_: pytest.fail("the whole model was widened"))
    model = randomise(nn.Sequential(nn.Linear(8, 8), make()), 0)
    opened = whole.Opened(whole.Twin(lambda: model))
    ran = opened.in_float64(Sample((ROWS,)), 0)
    assert ran.output.dtype is torch.float64
    assert "linear" in ran.trace.way


def reads_in_secret(m: Any, x: Tensor) -> Tensor:
    """No op is given the weight, and numpy has no numbers of a placeholder."""
    largest = float(abs(m.scale.detach().numpy()).max())
    y: Tensor = m.bn(m.conv(x)) * largest
    return y


def test_a_parameter_that_is_read_where_no_op_shows_it() -> None:
    model = net(reads_in_secret, conv=conv(), bn=bn())
    model.scale = nn.Parameter(torch.tensor([0.5, -2.0]))
    right = right_fold(model)
    wrong = changed(right, "conv.weight", lambda w: w[0].mul_(1.001))
    assert fusecli.verify(model, wrong, X).judgement is Judgement.DIFFERENT


def test_what_is_asked_of_a_run_is_asked_of_the_second_one_too() -> None:
    """Of a model that reads a parameter where no op shows it, the first run in float64 fails."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        return reads_in_secret(m, x) + torch.rand(())

    model = net(wiring, conv=conv(), bn=bn())
    model.scale = nn.Parameter(torch.tensor([0.5, -2.0]))
    asked = Asked(("conv", "bn"))
    ran = whole.Opened(whole.Twin(lambda: model)).in_float64(Sample((X,)), 0, asked=[asked])
    assert ran.random
    assert [*ran.calls[0]] == [("conv", 0), ("bn", 0)]


@dataclass(frozen=True)
class Asked:
    members: tuple[str, ...]
    rewrite: Any = None
    region: None = None
    custom: bool = True


def test_a_forward_that_writes_to_its_parameters_leaves_the_model_alone() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        m.scale.data.mul_(1.0)
        m.shift.data.add_(1.0)
        y: Tensor = m.bn(m.conv(x)) * m.scale
        return y

    model = net(wiring, conv=conv(), bn=bn())
    model.scale, model.shift = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(3))
    outcome = fused(model)
    assert outcome.status == "fused", verdict(outcome).reasons
    assert torch.equal(model.shift, torch.zeros(3))
    assert torch.equal(outcome.model.shift, torch.zeros(3))
