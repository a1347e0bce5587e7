"""Forwards as people write them: right folds are proven, wrong ones are not, the model is left alone."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecli
from fusecli.errors import ExitCode
from fusecli.outcome import Judgement
from fusecli.proof.run import float64_arithmetic
from tests.proof.nets import PAIR, X, bn, changed, conv, fused, net, right_fold, straight, verdict

KERNEL = torch.ones(3, 1, 3, 3) / 9


def pair(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x))


def looped(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = layer(x)
    return pair(m, x)


def recurrent(m: Any, x: Tensor) -> Tensor:
    y, (h, _) = m.lstm(pair(m, x).flatten(2))
    return m.gru(y)[0] + h.mean()


def autocasting(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return pair(m, x).float()


@torch.no_grad()
def without_grad(m: Any, x: Tensor) -> Tensor:
    return pair(m, x)


def with_grad(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return pair(m, x)


FORWARDS = {
    "float": lambda m, x: pair(m, x.float()).float(),
    "to_dtype": lambda m, x: pair(m, x.to(torch.float32)).to(dtype=torch.float32),
    "type": lambda m, x: pair(m, x.type(torch.float32)),
    "type_as": lambda m, x: pair(m, x.type_as(KERNEL)),
    "to_other": lambda m, x: pair(m, x.to(KERNEL)),
    "zeros": lambda m, x: pair(m, torch.cat([x, torch.zeros(2, 3, 8, 1)], 3)),
    "zeros_of_a_dtype": lambda m, x: pair(m, x + torch.zeros(x.shape, dtype=torch.float32)),
    "tensor": lambda m, x: pair(m, x * torch.tensor(0.5)) + torch.tensor([0.1], dtype=torch.float32),
    "new_tensor": lambda m, x: pair(m, x + x.new_tensor([0.1]) + x.new_zeros(8)),
    "numpy_constant": lambda m, x: pair(m, x * torch.from_numpy(np.float32([0.5]))),
    "plain_kernel": lambda m, x: pair(m, F.conv2d(x, KERNEL, groups=3, padding=1)),
    "complex": lambda m, x: pair(m, torch.fft.ifft2(torch.fft.fft2(x).to(torch.complex64)).real),
    "functional_dropout": lambda m, x: pair(m, F.dropout(x, training=m.training)),
    "in_place": lambda m, x: F.relu_(pair(m, F.relu_(x)).add_(1)).mul_(2),
    "in_place_residual": lambda m, x: pair(m, x).add_(x).relu_(),
    "interpolate": lambda m, x: F.interpolate(pair(m, F.interpolate(x, scale_factor=2, mode="bilinear")), 5),
    "softmax": lambda m, x: pair(m, x).flatten(1).softmax(1).log(),
    "detached": lambda m, x: pair(m, x.detach().data),
    "written": lambda m, x: pair(m, x.index_fill(1, torch.tensor([0]), 1.0)),
    "looped": looped,
    "recurrent": recurrent,
    "autocast": autocasting,
    "without_grad": without_grad,
    "with_grad": with_grad,
}


def built(name: str) -> Any:
    layers = nn.ModuleList([conv(), nn.ReLU(inplace=True), conv(), nn.ReLU6(inplace=True)])
    recurrences = {"lstm": nn.LSTM(64, 5, batch_first=True), "gru": nn.GRU(5, 4, bidirectional=True)}
    return net(FORWARDS[name], conv=conv(), bn=bn(), layers=layers, **recurrences)


@pytest.mark.parametrize("name", FORWARDS)
def test_right_folds_are_proven_and_wrong_ones_are_not(name: str) -> None:
    model = built(name)
    right = right_fold(model)
    wrong = copy.deepcopy(right)
    wrong.bn = nn.ReLU()
    assert fusecli.verify(model, wrong, X).judgement is Judgement.DIFFERENT
    wrong = changed(right, "conv.bias", lambda b: b[0].mul_(1.001))
    assert fusecli.verify(model, wrong, X).judgement is Judgement.DIFFERENT


NARROWING: dict[str, Any] = {
    "float": lambda x: x.float(),
    "half": lambda x: x.half(),
    "to": lambda x: x.to(torch.float32),
    "to_keyword": lambda x: x.to(dtype=torch.bfloat16),
    "to_other": lambda x: x.to(KERNEL),
    "type": lambda x: x.type(torch.float32),
    "type_as": lambda x: x.type_as(KERNEL),
    "zeros": lambda x: torch.zeros(2),
    "zeros_of_a_dtype": lambda x: torch.zeros(2, dtype=torch.float32),
    "tensor": lambda x: torch.tensor([0.5]),
    "softmax": lambda x: x.softmax(0, dtype=torch.float32),
    "complex": lambda x: torch.fft.fft(x).to(torch.complex64).real,
}


@pytest.mark.parametrize("name", NARROWING)
def test_what_a_forward_narrows_stays_wide_in_the_twin(name: str) -> None:
    with float64_arithmetic():
        assert NARROWING[name](torch.rand(3, dtype=torch.float64)).dtype is torch.float64
    assert torch.get_default_dtype() is torch.float32
    assert torch.zeros(2, dtype=torch.float32).dtype is torch.float32


def test_a_forward_with_no_float64_twin_is_inconclusive() -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            raise TypeError("float32 only")
        return pair(m, x)

    outcome = fused(net(wiring, conv=conv(), bn=bn()))
    assert outcome.exit_code is ExitCode.INCONCLUSIVE
    assert "does not run in float64: TypeError: float32 only" in verdict(outcome).reasons[0]


def test_hooks_of_the_user_are_neither_lost_nor_run_twice() -> None:
    model = net(pair, conv=conv(), bn=bn())
    model.conv.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model.bn.register_forward_hook(lambda _, __, output: output + 1)
    model.register_forward_hook(lambda _, __, output: output * 3)
    right = right_fold(model)
    assert torch.allclose(right(X), model(X), rtol=1e-4, atol=1e-3)
    right.conv._forward_pre_hooks.clear()
    assert fusecli.verify(model, right, X).judgement is Judgement.DIFFERENT


def test_an_attribute_that_no_tensor_shows_is_judged_in_float64() -> None:
    model = net(lambda m, x: m.act(m.bn2(pair(m, x))), conv=conv(), bn=bn(), bn2=bn(), act=nn.LeakyReLU(0.01))
    for dtype in (torch.float32, torch.bfloat16):
        stored = copy.deepcopy(model).to(dtype)
        right = right_fold(stored, x=X.to(dtype))
        right.bn2.eps = 1.1e-5  # far below what bfloat16 shows
        judged = fusecli.verify(stored, right, X.to(dtype))
        assert judged.judgement is Judgement.DIFFERENT
        assert "something besides the tensors was changed" in judged.reasons[0]


def test_a_fused_model_that_lost_a_module_is_different() -> None:
    model = net(pair, conv=conv(), bn=bn())
    right = right_fold(model)
    del right._modules["bn"]
    judged = fusecli.verify(model, right, X)
    assert judged.judgement is Judgement.DIFFERENT
    assert "bn" in judged.reasons[0]


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "ids": [id(p) for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "wants": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()],
        "keys": [sorted(module.__dict__) for module in model.modules()],
        "random": (torch.random.get_rng_state(), random.getstate(), list(np.random.get_state()[1])),
        "default": torch.get_default_dtype(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", ["in_place", "recurrent", "functional_dropout", "looped"])
@pytest.mark.parametrize("foreign", [False, True])
def test_the_users_models_are_left_as_they_were(name: str, foreign: bool) -> None:
    model = built(name)
    model.conv.register_forward_pre_hook(lambda *_: None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.bn.weight.requires_grad_(False)
    model.layers.train()
    random.seed(12345)
    np.random.seed(12345)
    before, x = snapshot(model), X.clone()
    outcome = fused(model, x=x)
    right = outcome.model
    assert same(before, snapshot(model))
    if foreign:
        del right._fusecli_groups
    after = snapshot(right)
    assert fusecli.verify(model, right, x).judgement is not Judgement.DIFFERENT
    assert same(before, snapshot(model))
    assert same({**after, "random": 0}, {**snapshot(right), "random": 0})
    assert torch.equal(x, X)


HEADS: dict[str, Any] = {
    "an output that no op makes": lambda m, x: pair(m, x).numpy() * m.factor,
    "an output that shows nothing": lambda m, x: (pair(m, x) * m.factor).mean((2, 3)).argmax(1),
}


@pytest.mark.parametrize("head", HEADS)
def test_what_is_no_tensor_is_held_against_the_original_too(head: str) -> None:
    """By less than float32 shows: an attribute is in no file and in no group."""
    model = net(HEADS[head], conv=conv(), bn=bn())
    model.factor = 1.0
    right = right_fold(model)
    assert fusecli.verify(model, right, X).equivalent
    other = copy.deepcopy(right)
    other.factor = 1.0 + 3e-8
    assert fusecli.verify(model, other, X).judgement is Judgement.DIFFERENT


def test_a_model_in_train_mode_is_judged_in_eval_mode() -> None:
    model = straight().train()
    assert fused(model, PAIR).status == "fused"
    assert model.training
