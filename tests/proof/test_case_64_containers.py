"""What a model takes, passes on inside and returns, in classes that look at what they are given."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusecli
from fusecli.outcome import Judgement
from tests.nets import images
from tests.proof.nets import changed, fused, net, verdict

LENGTHS = torch.tensor([7, 3, 5])
SPEECH = images(3, 4, 7)


class Checked(NamedTuple):
    hidden: Tensor
    mask: Tensor


class Strict(Checked):
    def __new__(cls, hidden: Tensor, mask: Tensor) -> Strict:
        if hidden.ndim != 3 or mask.dtype is not torch.bool:
            raise TypeError("not what a Strict holds")
        return super().__new__(cls, hidden, mask)


class Keyword(tuple):
    def __new__(cls, *, hidden: Tensor) -> Keyword:
        return super().__new__(cls, (hidden,))


class Back(nn.Module):
    """A submodule that takes and gives such a container."""

    def forward(self, x: Any) -> Any:
        return x


def model(wiring: Any) -> Any:
    return net(
        wiring,
        conv=nn.Conv1d(4, 6, 3, padding=1),
        bn=nn.BatchNorm1d(6),
        rnn=nn.LSTM(6, 5, batch_first=True),
        back=Back(),
    )


def body(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x)).transpose(1, 2)


def packed(m: Any, x: Tensor, lengths: Tensor) -> Any:
    return pack_padded_sequence(body(m, x), lengths, batch_first=True, enforce_sorted=False)


def unpacked(m: Any, given: Any) -> Any:
    x, _ = pad_packed_sequence(given, batch_first=True)
    return m.rnn(body(m, x.transpose(1, 2)))[0]


INPUT = pack_padded_sequence(SPEECH.transpose(1, 2), LENGTHS, batch_first=True, enforce_sorted=False)
MODELS: dict[str, tuple[Any, Any]] = {
    "inside": (
        lambda m, x, n: pad_packed_sequence(m.rnn(packed(m, x, n))[0], batch_first=True)[0],
        (SPEECH, LENGTHS),
    ),
    "through_a_module": (lambda m, x, n: m.rnn(m.back(packed(m, x, n)))[0].data, (SPEECH, LENGTHS)),
    "returned": (lambda m, x, n: m.rnn(packed(m, x, n)), (SPEECH, LENGTHS)),
    "given": (unpacked, INPUT),
    "given_among_others": (lambda m, x, y: unpacked(m, x) + y, (INPUT, images(3, 7, 5))),
    "strict": (lambda m, x: m.rnn(m.back(Strict(body(m, x), x > 0)).hidden)[0], SPEECH),
    "strict_returned": (lambda m, x: Strict(m.rnn(body(m, x))[0], x > 0), SPEECH),
    "keyword": (lambda m, x: m.back(Keyword(hidden=m.rnn(body(m, x))[0])), SPEECH),
}


@pytest.mark.parametrize("case", MODELS)
def test_case_64_it_runs_and_is_proven(case: str) -> None:
    wiring, x = MODELS[case]
    original = model(wiring)
    outcome = fused(original, x=x)
    assert outcome.status == "fused", (outcome.problems, outcome.verification)
    wrong = changed(outcome.model, "conv.bias", lambda w: w[0].add_(0.1))
    assert fusecli.verify(original, wrong, x).judgement is Judgement.DIFFERENT
    for other, judgement in ((outcome.model, Judgement.EQUIVALENT), (wrong, Judgement.DIFFERENT)):
        stranger = copy.deepcopy(other)
        del stranger._fusecli_groups
        assert fusecli.verify(original, stranger, x).judgement is judgement


NESTED: dict[str, Any] = {
    "returned": lambda y: torch.nested.nested_tensor([y[0, :3], y[1, :5]]),
    "jagged": lambda y: torch.nested.nested_tensor([y[0, :3], y[1, :5]], layout=torch.jagged),
    "in_a_dict": lambda y: {"rows": torch.nested.nested_tensor([y[0, :3], y[1]]), "all": y},
    "inside": lambda y: torch.nested.to_padded_tensor(torch.nested.nested_tensor([y[0, :3], y[1]]), 0.0),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", NESTED)
def test_case_64_a_nested_tensor_is_the_tensors_in_it(case: str) -> None:
    def wiring(m: Any, x: Tensor) -> Any:
        return NESTED[case](m.bn(m.conv(x)).transpose(1, 2))

    original = net(wiring, conv=nn.Conv1d(4, 6, 3, padding=1), bn=nn.BatchNorm1d(6))
    x = images(2, 4, 7)
    outcome = fused(original, x=x)
    assert outcome.status == "fused", verdict(outcome).reasons
    for change in (lambda w: w[0].add_(0.1), None):
        other = (
            copy.deepcopy(outcome.model) if change is None else changed(outcome.model, "conv.bias", change)
        )
        del other._fusecli_groups
        judged = fusecli.verify(original, other, x)
        expected = Judgement.EQUIVALENT if change is None else Judgement.DIFFERENT
        assert judged.judgement is expected, judged.reasons


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_case_64_a_nested_tensor_may_be_given() -> None:
    model = net(
        lambda m, x: m.bn(m.conv(torch.nested.to_padded_tensor(x, 0.0))),
        conv=nn.Conv1d(4, 6, 3, padding=1),
        bn=nn.BatchNorm1d(6),
    )
    x = torch.nested.nested_tensor([images(4, 5), images(4, 7)])
    outcome = fused(model, x=x)
    assert outcome.status == "fused", verdict(outcome).reasons
