"""Modules that a model holds a second time, outside of its module tree, and runs through that: whoever holds
the old ones has them as they were, and is told."""

from __future__ import annotations

import copy
import functools
import logging
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusecli import fuse, fuse_modules, fuse_modules_qat, plan, verify
from fusecli.outcome import Judgement
from tests.nets import images, randomise

X = images(2, 3, 9, 8)
GROUP = ["conv", "bn", "act"]
NAMED = "forward reaches conv through `layers`, not by its attribute"


class Net(nn.Module):
    """conv -> bn -> act, run as `hold` says: it gets the model, and returns what runs it."""

    run: Callable[[Any, Tensor], Tensor]

    def __init__(self, hold: Callable[[Any], Any]) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.head = nn.Conv2d(4, 2, 1)
        hold(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.run(self, x))
        return out


def _in_a_row(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def in_list(net: Any) -> None:
    net.layers = [net.conv, net.bn, net.act]
    net.run = _run_list


def _run_list(net: Any, x: Tensor) -> Tensor:
    return _in_a_row(net.layers, x)


def in_dict(net: Any) -> None:
    net.layers = {"a": net.conv, "b": net.bn, "c": net.act}
    net.run = _run_dict


def _run_dict(net: Any, x: Tensor) -> Tensor:
    return _in_a_row(net.layers.values(), x)


def nested(net: Any) -> None:
    net.layers = (deque([net.conv]), {"rest": [net.bn, (net.act,)]})
    net.run = _run_nested


def _run_nested(net: Any, x: Tensor) -> Tensor:
    (first,), rest = net.layers
    return _in_a_row([first, rest["rest"][0], *rest["rest"][1]], x)


def in_an_object(net: Any) -> None:
    net.layers = SimpleNamespace(conv=net.conv, bn=net.bn, act=net.act)
    net.run = _run_object


def _run_object(net: Any, x: Tensor) -> Tensor:
    return net.layers.act(net.layers.bn(net.layers.conv(x)))


def in_a_loose_sequential(net: Any) -> None:
    net.layers = [nn.Sequential(net.conv, net.bn, net.act)]
    net.run = _run_loose


def _run_loose(net: Any, x: Tensor) -> Tensor:
    return net.layers[0](x)


def as_methods(net: Any) -> None:
    net.layers = [net.conv.forward, net.bn.forward, net.act]
    net.run = _run_list


def as_partial(net: Any) -> None:
    net.layers = functools.partial(_in_a_row, [net.conv, net.bn, net.act])
    net.run = _run_partial


def _run_partial(net: Any, x: Tensor) -> Tensor:
    return net.layers(x)


class Slots:
    __slots__ = ("act", "bn", "conv", "unset")


class MoreSlots(Slots):
    __slots__ = ()


def in_slots(net: Any) -> None:
    net.layers = MoreSlots()
    net.layers.conv, net.layers.bn, net.layers.act = net.conv, net.bn, net.act
    net.run = _run_object


HOLDS = [in_list, in_dict, nested, in_an_object, in_slots, in_a_loose_sequential, as_methods, as_partial]


def net_of(hold: Callable[[Any], None]) -> Any:
    return randomise(Net(hold), 0)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("hold", HOLDS)
def test_fuse_modules_leaves_what_it_computes(hold: Callable[[Any], None], inplace: bool) -> None:
    net = net_of(hold)
    expected = net(X)
    fused = fuse_modules(net, GROUP, inplace=inplace)
    assert torch.allclose(fused(X), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(net(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hold", HOLDS)
def test_fuse_modules_says_who_holds_them(
    hold: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    fuse_modules(net_of(hold), GROUP)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("`layers` holds ")
    assert {"conv", "bn"} <= set(message.split(" too")[0].removeprefix("`layers` holds ").split(", "))


@pytest.mark.parametrize("hold", HOLDS)
def test_fuse_names_where_forward_reaches_them(hold: Callable[[Any], None]) -> None:
    net = net_of(hold)
    expected = copy.deepcopy(net.state_dict())
    outcome = fuse(net, X, groups=["conv", "bn"])
    assert (outcome.exit_code, [no.code for no in outcome.refused]) == (4, ["held-elsewhere"])
    assert outcome.refused[0].reason == NAMED
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())


def test_discovery_leaves_them_with_that_reason() -> None:
    net = net_of(in_list)
    assert fuse(net, X, discover=True).exit_code == 5
    left = {norm.module: (norm.code, norm.reason) for norm in plan(net, X).unfused}
    assert left == {"bn": ("held-elsewhere", NAMED.replace("conv", "bn"))}


class ClosureNet(nn.Module):
    """Runs its layers through a function that it has made of them, or of itself."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv, self.bn = conv, bn
        self.layers = (lambda x: self.bn(self.conv(x))) if whole else (lambda x: bn(conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_closure(whole: bool, inplace: bool, caplog: pytest.LogCaptureFixture) -> None:
    net = randomise(ClosureNet(whole=whole), 0)
    expected = net(X)
    outcome = fuse(net, X, groups=["conv", "bn"])
    assert (outcome.exit_code, outcome.refused[0].code) == (4, "held-elsewhere")
    assert "`layers`" in outcome.refused[0].reason
    fused = fuse_modules(net, ["conv", "bn"], inplace=inplace)
    assert torch.allclose(fused(X), expected, rtol=1e-5, atol=1e-5)
    # A closure over the model finds by their attributes what is there now: in place nothing is wrong.
    assert ("`layers`" in caplog.text) == (not whole or not inplace)


def test_half_of_a_group_in_a_list_is_refused_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class Half(Net):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.norms[0](self.conv(x))
            return out

    net = randomise(Half(lambda net: setattr(net, "norms", [net.bn])), 0)
    outcome = fuse(net, X, groups=["conv", "bn"])
    assert (outcome.exit_code, outcome.refused[0].reason) == (
        4,
        "forward reaches bn through `norms`, not by its attribute",
    )
    fuse_modules(net, ["conv", "bn"])
    assert "`norms` holds bn too, and not conv: where forward runs them there" in caplog.text


class Listing(nn.Module):
    """Keeps lists of its layers and weights, for bookkeeping; forward goes by the attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layers = [self.conv, self.bn]
        self.of_layer = {self.conv: "conv", "me": [self]}
        self.decayed = [self.conv.weight]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x))
        return out


def test_a_list_that_nobody_runs_hinders_nothing(caplog: pytest.LogCaptureFixture) -> None:
    net = randomise(Listing(), 0)
    for options in ({"groups": ["conv", "bn"]}, {"discover": True}):
        outcome = fuse(net, X, **options)  # type: ignore[arg-type]
        assert (outcome.exit_code, outcome.groups[0].status) == (0, "equivalent")
        assert verify(net, outcome.model, X).judgement is Judgement.EQUIVALENT  # type: ignore[arg-type]
    fused = fuse_modules(net, ["conv", "bn"])
    assert torch.allclose(fused(X), net(X), rtol=1e-4, atol=1e-4)
    assert "`decayed` holds conv.weight too" in caplog.text


def test_a_copy_shares_no_weight_with_its_original_through_a_list() -> None:
    net = net_of(in_list)
    fused: Any = fuse_modules(net, GROUP)
    ours = {id(tensor) for tensor in net.state_dict(keep_vars=True).values()}
    assert not ours & {id(tensor) for layer in fused.layers for tensor in layer.parameters()}


def test_blocks_in_a_list_are_fused() -> None:
    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.second = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
            self.stages = [self.first, self.second]

        def forward(self, x: Tensor) -> Tensor:
            return _in_a_row(self.stages, x)

    net = randomise(Stages(), 0)
    outcome = fuse(net, X, discover=True)
    assert (outcome.exit_code, len(outcome.groups)) == (0, 2)
    assert [type(module) for module in outcome.model.stages[1]] == [nn.Conv2d, nn.Identity]  # type: ignore
    assert torch.allclose(outcome.model(X), net(X), rtol=1e-4, atol=1e-4)  # type: ignore[misc]


def test_models_without_such_a_place_are_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.LSTM(5, 2))
    net.activation, net.sizes, net.own = F.relu, [3, 4], net.forward
    net.hook = logging.getLogger("fusecli").info
    fuse_modules(randomise(net, 0), ["0", "1", "2"])
    assert caplog.records == []


# Hooks, modes and methods.


def test_the_old_modules_keep_their_hooks() -> None:
    net, calls = net_of(in_list), []
    for name in GROUP:
        module = net.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, n=name: calls.append(f"pre {n}"))
        module.register_forward_hook(lambda *_, n=name: calls.append(f"post {n}"))
    net(X)
    expected = [*calls]
    calls.clear()
    fuse_modules(net, GROUP, inplace=True)(X)
    assert calls == expected


@pytest.mark.parametrize("group", [GROUP, ["conv", "bn"]])
def test_containers_of_training_leave_the_modules_in_the_list(group: list[str]) -> None:
    net = net_of(in_list).train()
    calls: list[str] = []
    net.conv.register_forward_pre_hook(lambda *_: calls.append("pre"))
    expected = copy.deepcopy(net)(X)
    calls.clear()
    held = [(type(module), module.training, [*module.children()]) for module in net.layers]
    fused: Any = fuse_modules_qat(net, group, inplace=True)
    assert [(type(module), module.training, [*module.children()]) for module in net.layers] == held
    assert torch.equal(fused(X), expected)
    assert calls == ["pre"]
    # They learn together, and change their modes together.
    assert fused.conv[0].weight is fused.layers[0].weight
    fused.eval()
    assert not fused.layers[1].training


def test_a_hook_of_a_layer_is_removed_by_its_handle() -> None:
    net: Any = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 0)
    calls: list[str] = []
    handle = net[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    fuse_modules(net, ["0", "1"], inplace=True)
    handle.remove()
    net(X)
    assert calls == []


class Renaming(nn.Conv2d):
    """Reads checkpoints of an earlier version, by a hook that is given the module."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_load_state_dict_pre_hook(_rename)
        self.seen: list[nn.Module] = []


def _rename(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    module.seen.append(module)
    if f"{prefix}kernel" in state:
        state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")


def test_hooks_on_loading_are_those_of_the_new_layer() -> None:
    net: Any = randomise(nn.Sequential(Renaming(3, 4, 3), nn.BatchNorm2d(4)), 0)
    fuse_modules(net, ["0", "1"], inplace=True)
    state = {name.replace("weight", "kernel"): value for name, value in net.state_dict().items()}
    net.load_state_dict(state)
    assert net[0].seen == [net[0]]


def test_a_module_with_several_names_keeps_them_all() -> None:
    net: Any = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), 0)
    net.add_module("again", net[2])
    fuse_modules(net, ["0", "1"], inplace=True)
    assert net.again is net[2]
