"""What every rule of QAT is held against: its chain, trained beside it, and torch.ao's own fusion."""

from __future__ import annotations

import copy
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fusecli import fuse_modules_qat
from tests.rules.side_by_side import kinds, names


def trained(net: nn.Module, x: Tensor, steps: int = 2) -> list[Tensor]:
    """Float64 outputs of some steps of training on x, then the output in eval mode."""
    net = copy.deepcopy(net).double().train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    seen = []
    for step in range(steps):
        y = net(x.double() + step)
        seen.append(y.detach())
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (y * weights).sum().backward()
        optimizer.step()
    return [*seen, net.eval()(x.double()).detach()]


def numbers(net: nn.Module) -> list[Tensor]:
    """Every tensor, in the order of the state dict: a container holds its members' in their order."""
    return list(net.state_dict().values())


def assert_trains_alike(net: nn.Module, x: Tensor, group: list[str] | None = None) -> Any:
    """The fused net gives the same outputs, step by step; returns it."""
    fused = fuse_modules_qat(net.train(), group or names(net))
    assert fused.training
    assert all(map(torch.equal, trained(fused, x), trained(net, x)))
    return fused


def assert_like_torch_ao_qat(net: nn.Module, x: Tensor) -> None:
    """Same classes, same keys, same training."""
    ours = assert_trains_alike(net, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = importlib.import_module("torch.ao.quantization").fuse_modules_qat(net, names(net))
    assert kinds(ours) == kinds(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert all(map(torch.equal, trained(ours, x), trained(theirs, x)))


def assert_hooks_run_once_qat(net: nn.Module, x: Tensor) -> None:
    """All hooks are called once: those in the middle too, for their modules are still there."""
    calls: list[str] = []
    for name, child in net.named_children():
        child.register_forward_pre_hook(lambda *_, name=name: calls.append(f"{name} pre"))
        child.register_forward_hook(
            lambda *_, name=name, **__: calls.append(f"{name} post"), with_kwargs=True
        )
    net.train()(x)
    before = list(calls)
    calls.clear()
    fuse_modules_qat(net, names(net))(x)
    assert calls == before
