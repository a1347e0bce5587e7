"""Many folds at random: no right one is rejected, no wrong one passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from fusecli.outcome import Judgement
from tests.nets import images, randomise
from tests.proof.nets import Net, fused, verdict

GROUPS = [["a", "bn1", "act"], ["b", "bn2"], ["c", "bn3"]]
COUNT = 200


def residual(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.bn1(m.a(x)))
    y = y + m.bn2(m.b(y)).sigmoid()
    return m.head(m.pool(m.bn3(m.c(y)).relu()).flatten(1))


def drawn(seed: int) -> tuple[Any, Tensor]:
    """A network with random widths, kernels, numbers, dtype and scale, and an input for it."""
    rng = torch.Generator().manual_seed(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=rng))]

    width, kernel, bias = pick(4, 8, 12), pick(1, 3), pick(True, False)
    up = nn.ConvTranspose2d(width, width, 2, stride=2, groups=pick(1, 2, 4), bias=bias)
    model = Net(
        residual,
        a=nn.Conv2d(3, width, kernel, stride=pick(1, 2), bias=bias),
        b=nn.Conv2d(width, width, 3, padding=1, groups=pick(1, 2, width), bias=pick(True, False)),
        c=pick(up, nn.Conv2d(width, width, kernel)),
        **{f"bn{number}": nn.BatchNorm2d(width, eps=pick(1e-3, 1e-5)) for number in (1, 2, 3)},
        act=nn.ReLU(inplace=pick(True, False)),
        pool=pick(nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(2), nn.Identity()),
        head=nn.Identity(),
    )
    randomise(model, seed)
    with torch.no_grad():
        for name in ("bn1", "bn2", "bn3"):
            getattr(model, name).weight.mul_(pick(1, 1, 1e-3, 1e2))
            getattr(model, name).running_var.mul_(pick(1, 1, 1e-4, 1e3))
            getattr(model, name).running_mean.mul_(pick(1, 1, 10))
        model.a.weight.mul_(pick(1, 0.1, 10))
    dtype = pick(torch.float32, torch.float32, torch.bfloat16)
    return model.to(dtype), images(2, 3, 9, 9, seed=seed, dtype=dtype) * pick(1, 0.01, 100)


def identity(model: Any, path: str) -> None:
    container = getattr(model, path)
    container[1] = nn.Identity()


def refolded(change: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """The right fold of a model in which something has been changed first."""

    def make(model: Any, right: Any) -> Any:
        other = copy.deepcopy(model)
        with torch.no_grad():
            change(other)
        return fusecli.fuse_modules(other, GROUPS)

    return make


def swapped(model: Any) -> None:
    model.bn2, model.bn3 = model.bn3, model.bn2
    model.bn2.eps, model.bn3.eps = model.bn3.eps, model.bn2.eps


def without_activation(model: Any, right: Any) -> Any:
    identity(right, "a")
    return right


def without_bias(model: Any, right: Any) -> Any:
    right.b.bias.data.zero_()
    return right


WRONG: dict[str, Callable[[Any, Any], Any]] = {
    "eps": refolded(lambda m: setattr(m.bn2, "eps", 0.1 if m.bn2.eps == 1e-3 else 1e-3)),
    "gamma": refolded(lambda m: m.bn2.weight[1].neg_()),
    "bias": without_bias,
    "activation": without_activation,
    "swapped": refolded(swapped),
    "mean": refolded(lambda m: m.bn3.running_mean.zero_()),
}


def neighbours(a: nn.Module, b: nn.Module) -> bool:
    """Whether rounding hides the change: no stored number differs by more than one unit in its last place."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    floating = ((one, other) for one, other in pairs if one.is_floating_point())
    return all(
        bool(((one.double() - other.double()).abs() <= torch.finfo(one.dtype).eps * one.double().abs()).all())
        for one, other in floating
    )


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, COUNT, 50))
def test_no_right_fold_is_rejected(start: int) -> None:
    rejected = {}
    for seed in range(start, start + 50):
        model, x = drawn(seed)
        outcome = fused(model, *GROUPS, x=x)
        if outcome.status != "fused":
            rejected[seed] = verdict(outcome).reasons if outcome.verification else outcome.refused
    assert not rejected


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG)
def test_no_wrong_fold_passes(kind: str) -> None:
    passed = {}
    for seed in range(COUNT // len(WRONG) + 1):
        model, x = drawn(seed)
        right = fusecli.fuse_modules(model, GROUPS)
        wrong = WRONG[kind](model, copy.deepcopy(right))
        judged = fusecli.verify(model, wrong, x)
        same = kind != "activation" and neighbours(right, wrong)
        if judged.judgement is not Judgement.DIFFERENT and not same:
            passed[seed] = (judged.judgement, judged.reasons)
    assert not passed


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG)
def test_outputs_alone_show_wrong_folds_or_nothing(kind: str) -> None:
    """Without the names of the groups a wrong fold may only pass within the rounding of the weights."""
    for seed in range(COUNT // len(WRONG) + 1):
        model, x = drawn(seed)
        wrong = WRONG[kind](model, fusecli.fuse_modules(model, GROUPS))
        wrong.__dict__.pop("_fusecli_groups", None)
        judged = fusecli.verify(model, wrong, x)
        if judged.equivalent:
            assert judged.float64_error is not None
            assert judged.float64_error <= judged.tolerance < 1e-2
