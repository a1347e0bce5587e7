"""Forward hooks: which survive, how often they run, and which are reported as lost."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from fusecli import fuse, fuse_modules
from fusecli.outcome import Judgement
from tests import nets
from tests.proof.nets import judged

X = nets.images(2, 3, 9, 8)
GROUP = ["conv", "bn", "relu"]


def net_of(kind: str) -> Any:
    layers: dict[str, nn.Module] = {"conv": nn.Conv2d(3, 6, 3), "bn": nn.BatchNorm2d(6)}
    if kind == "act":
        layers["bn"] = nets.BatchNormAct2d(6, nn.ReLU())
    if kind == "relu":
        layers["relu"] = nn.ReLU()
    return nets.chain(**layers)


def ends(net: nn.Module) -> tuple[list[str], nn.Module, nn.Module]:
    names = [name for name, _ in net.named_children()]
    return names, net.get_submodule(names[0]), net.get_submodule(names[-1])


@pytest.mark.parametrize("kind", ["pair", "relu", "act"])
def test_case_40_no_hooks_nothing_lost(kind: str) -> None:
    outcome = fuse(net_of(kind), X, groups=ends(net_of(kind))[0])
    assert [entry for entry in outcome.ledger if entry.kind == "hook"] == []


@pytest.mark.parametrize("kind", ["pair", "relu", "act"])
def test_case_40_several_hooks_run_once_each_in_their_order(kind: str) -> None:
    net, calls = net_of(kind), []
    names, first, last = ends(net)
    for number in range(3):
        first.register_forward_pre_hook(lambda *_, n=number: calls.append(f"pre {n}"))
        last.register_forward_hook(lambda *_, n=number: calls.append(f"post {n}"))
    fuse_modules(net, names)(X)
    assert calls == ["pre 0", "pre 1", "pre 2", "post 0", "post 1", "post 2"]


@pytest.mark.parametrize("kind", ["pair", "relu", "act"])
def test_case_40_with_kwargs_and_always_called(kind: str) -> None:
    net, seen = net_of(kind), []
    names, first, last = ends(net)
    first.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((len(args), kwargs)), with_kwargs=True
    )
    last.register_forward_hook(lambda m, args, kwargs, out: seen.append(out.shape), with_kwargs=True)
    last.register_forward_hook(lambda *_: seen.append("always"), always_call=True)
    out = fuse_modules(net, names)(X)
    assert seen == [(1, {}), out.shape, "always"]
    fused = fuse_modules(net, names)
    with pytest.raises(RuntimeError):
        fused.get_submodule(names[0])(X[:, :2])
    assert seen[3:] == ([(1, {})] if kind == "act" else [(1, {}), "always"])


def test_case_40_hooks_change_the_tensors_they_see() -> None:
    net = net_of("relu")
    net.conv.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    net.relu.register_forward_hook(lambda _, __, output: output + 1)
    outcome = fuse(net, X, groups=GROUP)
    assert (outcome.exit_code, outcome.groups[0].status) == (0, "equivalent")
    assert torch.allclose(outcome.model(X), net(X), rtol=1e-4, atol=1e-3)


def test_case_40_torch_ao_runs_the_pre_hook_twice_and_breaks_kwargs(torch_ao: Any) -> None:
    net, calls = net_of("pair"), []
    net.conv.register_forward_pre_hook(lambda *_: calls.append("pre"))
    torch_ao(net, ["conv", "bn"])(X)
    assert calls == ["pre", "pre"]
    net = net_of("relu")
    net.relu.register_forward_hook(lambda m, args, kwargs, output: None, with_kwargs=True)
    with pytest.raises(TypeError):
        torch_ao(net, GROUP)(X)


@pytest.mark.parametrize("inplace", [False, True])
def test_case_40_on_nested_modules_and_around_them(inplace: bool) -> None:
    net, calls = nn.Sequential(net_of("relu")), []
    net[0].register_forward_pre_hook(lambda *_: calls.append("block pre"))
    net[0].register_forward_hook(lambda *_: calls.append("block post"))
    net[0].conv.register_forward_pre_hook(lambda *_: calls.append("pre"))
    net[0].relu.register_forward_hook(lambda *_: calls.append("post"))
    fuse_modules(net, [f"0.{name}" for name in GROUP], inplace)(X)
    assert calls == ["block pre", "pre", "post", "block post"]


def test_case_40_inplace_false_leaves_the_hooks_of_the_original() -> None:
    net, calls = net_of("relu"), []
    net.conv.register_forward_pre_hook(lambda *_: calls.append("pre"))
    net.relu.register_forward_hook(lambda *_: calls.append("post"))
    fuse_modules(net, GROUP)
    net(X)
    assert calls == ["pre", "post"]


def watch(module: nn.Module, *_: object) -> None:
    pytest.fail(f"a hook in the middle ran on {module}")


def test_case_40_hooks_in_the_middle_are_lost_and_named(caplog: pytest.LogCaptureFixture) -> None:
    net = net_of("relu")
    net.conv.register_forward_hook(watch)
    net.bn.register_forward_pre_hook(watch)
    net.bn.register_forward_hook(watch)
    net.bn.register_full_backward_hook(watch)
    fuse_modules(net, GROUP)(X)
    lost = ["forward hook watch", "forward pre hook watch", "forward hook watch", "backward hook watch"]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"{where}: hook lost: {hook}" for where, hook in zip(["conv", "bn", "bn", "bn"], lost, strict=True)
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_case_40_the_ledger_of_fuse_names_them() -> None:
    net, calls = net_of("pair"), []
    net.bn.register_forward_pre_hook(lambda *_: calls.append("bn"))
    outcome = fuse(net, X, groups=["conv", "bn"])
    (entry,) = (entry for entry in outcome.ledger if entry.kind == "hook")
    assert (entry.where, entry.what.startswith("lost: forward pre hook")) == ("bn", True)
    calls.clear()
    outcome.model(X)
    assert calls == []


def test_a_hook_in_the_middle_that_changes_its_tensor_is_noticed() -> None:
    net = net_of("pair")
    net.bn.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    outcome = fuse(net, X, groups=["conv", "bn"])
    assert (outcome.exit_code, [no.code for no in outcome.refused]) == (4, ["not-adjacent"])
    assert "aten.mul" in outcome.refused[0].evidence[0]
    assert judged(net, x=X).judgement is Judgement.DIFFERENT


@pytest.mark.parametrize("wrap", ["conv_relu", "bn_relu"])
def test_hooks_on_both_members_of_a_container_stay(wrap: str) -> None:
    first: nn.Module = nn.Conv2d(3, 3, 3) if wrap == "conv_relu" else nn.BatchNorm2d(3)
    net, calls = nets.chain(first=first, relu=nn.ReLU()), []
    net.first.register_forward_hook(lambda *_: calls.append("first"))
    net.relu.register_forward_pre_hook(lambda *_: calls.append("relu"))
    fuse_modules(net, ["first", "relu"])(X)
    assert calls == ["first", "relu"]


def test_hooks_are_called_with_the_container_as_in_torch_ao(torch_ao: Any) -> None:
    net, seen = net_of("relu"), []
    net.conv.register_forward_pre_hook(lambda module, _: seen.append(type(module).__name__))
    net.relu.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    for fused in (fuse_modules(net, GROUP), torch_ao(net, GROUP)):
        fused(X)
    # torch.ao leaves a second pre-hook on the convolution inside.
    assert seen == ["ConvReLU2d", "ConvReLU2d", "ConvReLU2d", "Conv2d", "ConvReLU2d"]
