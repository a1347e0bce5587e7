"""Whatever a forward takes and returns."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from fusecli.errors import ExitCode, UsageError
from fusecli.outcome import Judgement
from tests.nets import images
from tests.proof.nets import X, bn, changed, conv, fused, net, right_fold, straight, verdict

Pair = namedtuple("Pair", "boxes scores")


@dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None


@dataclass(frozen=True)
class Frozen:
    logits: Tensor


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


OUTPUTS = {
    "dict": lambda y: {"y": y, "n": 3},
    "ordered_dict": lambda y: OrderedDict(b=y, a=y + 1),
    "tuple": lambda y: (y, y.sum()),
    "namedtuple": lambda y: Pair(y, y.mean()),
    "dataclass": Answer,
    "frozen_dataclass": Frozen,
    "object": Plain,
    "nested": lambda y: [{"a": [y, None, ("name", 3, True)]}, [], ()],
    "integers": lambda y: (y, y.argmax(1), y > 0, y.shape),
    "scalar": lambda y: y.sum().item(),
    "complex": lambda y: torch.fft.rfft2(y),
    "empty": lambda y: (y, y[:0]),
    "max_of_a_dimension": lambda y: y.max(1),
    "numpy": lambda y: y.numpy(),
    "sparse": lambda y: y.to_sparse(),
    "infinite": lambda y: y.masked_fill(y < 0.5, -torch.inf),
    "negative_zero": lambda y: -(y * 0),
    "quantiles_of_a_set": lambda y: (y, {1, 2}, torch.float32, slice(None).step),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_case_50_outputs(name: str) -> None:
    model = straight(OUTPUTS[name])
    group = ["conv", "bn", "relu"]
    right = right_fold(model, group)
    wrong = changed(right, "conv.0.bias", lambda bias: bias.add_(1e-3))
    assert fusecli.verify(model, wrong, X).judgement is Judgement.DIFFERENT


@pytest.mark.parametrize("odd", [lambda: object(), lambda: (_ for _ in ()), lambda: print, lambda: slice(3)])
def test_case_50_unknown_objects_are_inconclusive(odd: Any) -> None:
    outcome = fused(straight(lambda y: (y, odd())), ["conv", "bn", "relu"])
    assert outcome.exit_code is ExitCode.INCONCLUSIVE
    assert "cannot be compared" in verdict(outcome).reasons[0]


INPUTS: dict[str, tuple[Any, Any]] = {
    "several": (lambda m, x, y: m.bn(m.conv(x)) + y, (X, X)),
    "keywords": (lambda m, *, x, scale: m.bn(m.conv(x * scale)), {"x": X, "scale": 2}),
    "nested": (lambda m, pair: m.bn(m.conv(pair[0] + pair[1]["b"])), ((X, {"b": X}),)),
    "a_dict": (lambda m, batch: m.bn(m.conv(batch["x"])), ({"x": X},)),
    "dataclass": (lambda m, a: m.bn(m.conv(a.logits)), (Answer(X),)),
    "integers": (lambda m, i: m.bn(m.conv(m.table(i).movedim(-1, 1))), torch.arange(32).view(2, 4, 4)),
    "one_only": (lambda m, x: m.bn(m.conv(x.view(3, 8, 8)[None])), images(1, 3, 8, 8)),
    "channels_last": (lambda m, x: m.bn(m.conv(x)), X.to(memory_format=torch.channels_last)),
    "wants_grad": (lambda m, x: m.bn(m.conv(x)), X.clone().requires_grad_()),
    "not_contiguous": (lambda m, x: m.bn(m.conv(x)), X.transpose(2, 3)[:, :, ::2]),
}


@pytest.mark.parametrize("name", INPUTS)
def test_case_50_inputs(name: str) -> None:
    wiring, x = INPUTS[name]
    model = net(wiring, conv=conv(), bn=bn(), table=nn.Embedding(32, 3))
    assert fused(model, x=x).status == "fused"


def test_case_50_inputs_that_do_not_fit_are_the_users_mistake() -> None:
    model = straight()
    right = right_fold(model)
    with pytest.raises(UsageError, match="does not run on these inputs"):
        fusecli.verify(model, right, images(2, 5, 8, 8))
    with pytest.raises(UsageError, match="does not run on these inputs"):
        fusecli.verify(model, straight(), images(2, 5, 8, 8))
