"""The words of the rules that need a run: a network is wired in the test, and its group is folded or
refused."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import fusecli
from fusecli.algebra import round_once
from fusecli.errors import ExitCode
from fusecli.outcome import Outcome
from tests.nets import float64
from tests.rules.side_by_side import relative_error

DTYPES = (torch.float32, torch.bfloat16)


class LayerScale(nn.Module):
    """gamma x, gamma of any shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Affine(nn.Module):
    """beta + x alpha, both of one shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.beta + x * self.alpha


class Normalise(nn.Module):
    """(x - mean) / std of images, both buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class RMSNorm(nn.Module):
    """As language models write it by hand."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())


class PlainConv2d(nn.Conv2d):
    """A subclass that does nothing else, which only a probe can know."""


class PlainBatchNorm2d(nn.BatchNorm2d):
    """The same for a norm."""


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def refusal(model: nn.Module, x: Any, group: Iterable[str]) -> str:
    """The code of the one refusal of the group; nothing was fused, and the model is what it was."""
    before, classes = state(model), [type(module) for module in model.modules()]
    outcome = fusecli.fuse(model, x, groups=[list(group)])
    assert (outcome.exit_code, outcome.model) == (ExitCode.REFUSED, None), outcome.status
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    (refused,) = outcome.refused
    return refused.code


def left(model: nn.Module, x: Any) -> str:
    """Discovery offers nothing here, without a proof that would reject it; why the norms stay, "" where
    nothing is a norm."""
    proposal = fusecli.plan(model, x)
    assert proposal.groups == ()
    codes = {norm.code for norm in proposal.unfused}
    assert len(codes) <= 1
    return codes.pop() if codes else ""


def folded(model: nn.Module, x: Any, rule: str, modules: str) -> Any:
    """The fold that discovery finds: of these modules by this rule, in float64 the same function to rounding,
    proven in the model's own dtype; a second time there is nothing left. Returns the fused model."""
    outcome = fused(model, x)
    assert [(group.rule, " ".join(group.modules)) for group in outcome.groups] == [(rule, modules)]
    again = fusecli.fuse(outcome.model, x, discover=True)
    assert (again.exit_code, again.groups) == (ExitCode.NOTHING, ())
    return outcome.model


def fused(model: nn.Module, x: Any, *groups: str) -> Outcome:
    """What is found, or these groups, each the names in one string: proven, and a float64 twin within
    1e-12."""
    listed: Any = {"groups": [group.split() for group in groups]} if groups else {"discover": True}
    twin, exact = float64(model), x.double()
    outcome = fusecli.fuse(twin, exact, **listed)
    assert outcome.status == "fused", (outcome.status, outcome.verification, outcome.refused, outcome.unfused)
    assert relative_error(outcome.model(exact), twin(exact)) < 1e-12
    outcome = fusecli.fuse(model, x, **listed)
    assert outcome.status == "fused", outcome.verification
    return outcome


def assert_rounded_once(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    """Every stored tensor is the float64 fold of the tensors in `dtype`, rounded to nearest."""
    narrow = copy.deepcopy(model).to(dtype)
    stored = fusecli.fuse(narrow, x.to(dtype), discover=True)
    exact = fusecli.fuse(float64(narrow), x.double(), discover=True)
    assert (stored.status, exact.status) == ("fused", "fused"), stored.verification
    wanted = exact.model.state_dict()
    assert stored.model.state_dict().keys() == wanted.keys()
    for key, tensor in stored.model.state_dict().items():
        right = round_once(wanted[key], dtype) if tensor.is_floating_point() else wanted[key]
        assert (tensor.dtype, torch.equal(tensor, right)) == (right.dtype, True), key


def classes(model: Any, *paths: str) -> list[str]:
    return [type(model.get_submodule(path)).__name__ for path in paths]


def lost_hooks(outcome: Outcome) -> list[str]:
    return [entry.where for entry in outcome.ledger if entry.kind == "hook"]


def hooked(model: Any, path: str, calls: list[str]) -> Any:
    """The model, whose module at `path` notes before it is called, and after."""
    module = model.get_submodule(path)
    module.register_forward_pre_hook(lambda *_: calls.append(f"{path} takes"))
    module.register_forward_hook(lambda *_: calls.append(f"{path} gives"))
    return model
