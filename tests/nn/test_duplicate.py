"""Copies of models: nothing in common with the original, or a refusal that changes nothing."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusecli import fuse, fuse_modules, fuse_modules_qat, plan, prepare_qat, verify
from fusecli.errors import RefusedError, UsageError
from fusecli.interop.torch_ao import to_torch_ao
from fusecli.outcome import Judgement
from tests import torch_ao_qat
from tests.nets import images, randomise

X = images(2, 3, 9, 8)
PAIR = ["conv", "bn"]


class Itself(nn.Sequential):
    """A frozen teacher, which nobody is to copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Itself:
        return self


class SameWeights(nn.Sequential):
    """A new module with the old parameters."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SameWeights:
        return SameWeights(*self)


class SameMemory(nn.Conv2d):
    """New parameters on the old memory."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SameMemory:
        fresh = SameMemory(self.in_channels, self.out_channels, 3)
        fresh.weight = nn.Parameter(self.weight.detach())
        return fresh


class Frozen(nn.Parameter):
    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self


def frozen_parameter() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3)
    conv.weight = Frozen(conv.weight.detach())
    return conv


MAKERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "itself": (lambda: Itself(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), "body.teacher"),
    "same weights": (lambda: SameWeights(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), "body.teacher.0"),
    "same memory": (lambda: SameMemory(3, 3, 3), "body.teacher.weight"),
    "a parameter": (frozen_parameter, "body.teacher.weight"),
}


class Net(nn.Module):
    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"teacher": teacher})
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(self.body["teacher"](x)))
        return out


CALLS: dict[str, Callable[[Any], Any]] = {
    "fuse": lambda net: fuse(net, X, groups=PAIR),
    "discover": lambda net: fuse(net, X, discover=True),
    "plan": lambda net: plan(net, X),
    "fuse_modules": lambda net: fuse_modules(net, PAIR),
    "fuser_func": lambda net: fuse_modules(net, PAIR, fuser_func=lambda modules, *_: modules),
    "verify": lambda net: verify(net, net, X),
    "fuse_modules_qat": lambda net: fuse_modules_qat(net.train(), PAIR),
    "prepare_qat": lambda net: prepare_qat(net.train()),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize(("make", "named"), MAKERS.values(), ids=list(MAKERS))
def test_what_is_not_copied_is_refused_by_name(
    make: Callable[[], nn.Module], named: str, call: Callable[[Any], Any]
) -> None:
    net = randomise(Net(make()), 0)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modules = [(id(module), type(module)) for module in net.modules()]
    with pytest.raises(RefusedError, match=f"a copy of the model has {named} in common with it; let __deep"):
        call(net)
    after = net.state_dict()
    assert [(id(module), type(module)) for module in net.modules()] == modules
    assert all(value.dtype is after[name].dtype for name, value in state.items())
    assert all(torch.equal(value, after[name]) for name, value in state.items())


def test_the_way_to_torch_ao_refuses_it_too() -> None:
    torch_ao_qat.torch_ao("quantization")
    with pytest.raises(RefusedError, match="in common with it"):
        to_torch_ao(randomise(Net(Itself(nn.Conv2d(3, 3, 3))), 0))


def test_in_place_nothing_is_copied() -> None:
    net: Any = randomise(Net(Itself(nn.Conv2d(3, 3, 3))), 0)
    expected = net(X)
    assert fuse_modules(net, PAIR, inplace=True) is net
    assert torch.allclose(net(X), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_copied_is_named() -> None:
    net: Any = randomise(Net(nn.Conv2d(3, 3, 3)), 0)
    net.body["teacher"].guard = threading.Lock()
    for call in (CALLS["fuse"], CALLS["plan"], CALLS["fuse_modules"], CALLS["verify"]):
        with pytest.raises(RefusedError, match=r"body\.teacher cannot be copied: TypeError: cannot"):
            call(net)


def test_a_copy_of_its_own_making_is_as_good() -> None:
    class Careful(nn.Conv2d):
        def __deepcopy__(self, memo: dict[int, Any]) -> Careful:
            fresh = Careful(self.in_channels, self.out_channels, 3)
            fresh.load_state_dict(self.state_dict())
            return fresh

    net = randomise(Net(Careful(3, 3, 3)), 0)
    assert fuse(net, X, groups=PAIR).exit_code == 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls both of them unfinished
def test_buffers_that_torch_does_not_copy() -> None:
    net: Any = randomise(Net(nn.Conv2d(3, 3, 3)), 0)
    net.register_buffer("mask", torch.eye(3).to_sparse_csr(), persistent=False)
    net.lengths = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    fused: Any = fuse_modules(net, PAIR)
    assert torch.equal(fused.mask.to_dense(), torch.eye(3))
    assert fused.mask is not net.mask


def test_a_state_dict_that_cannot_be_made() -> None:
    class Broken(Net):
        def state_dict(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("not today")

    net = Broken(nn.Conv2d(3, 3, 3)).eval()
    for call in (CALLS["fuse"], CALLS["plan"]):
        with pytest.raises(UsageError, match="model: it gives no state dict: RuntimeError: not today; make"):
            call(net)


# Models whose tensors are those of inference mode: torch lets nobody write to them, or ask for gradients.


def of_inference(change: Callable[[Any], Any] = lambda net: None) -> Any:
    with torch.inference_mode():
        net = randomise(Net(nn.Conv2d(3, 3, 3)), 0)
        change(net)
    assert net.conv.bias.is_inference()
    return net


CHANGES: dict[str, Callable[[Any], Any]] = {
    "plain": lambda net: None,
    "weight_norm": lambda net: nn.utils.parametrizations.weight_norm(net.conv),
    "weight_norm, the old one": lambda net: nn.utils.weight_norm(net.conv),
    "trained": lambda net: [parameter.requires_grad_(True) for parameter in net.parameters()],
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the old weight_norm is deprecated
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
@pytest.mark.parametrize(
    "options", [{"groups": PAIR}, {"discover": True}, {"discover": True, "shared": "clone"}]
)
def test_a_model_of_inference_mode_is_fused(change: Callable[[Any], Any], options: Any) -> None:
    net = of_inference(change)
    outcome: Any = fuse(net, X, bake=True, **options)
    assert (outcome.exit_code, outcome.status) == (0, "fused")
    with torch.no_grad():
        assert torch.allclose(outcome.model(X), net(X), rtol=1e-4, atol=1e-4)
    assert plan(net, X, bake=True).groups == (("conv", "bn"),)
    assert verify(net, outcome.model, X).judgement is Judgement.EQUIVALENT
    assert verify(net, copy.deepcopy(outcome.model), X).judgement is Judgement.EQUIVALENT


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_fuse_modules_on_a_model_of_inference_mode(inplace: bool, inside: bool) -> None:
    net = of_inference()
    with torch.inference_mode(inside):
        with torch.no_grad():
            expected = net(X)
        fused = fuse_modules(net, PAIR, inplace=inplace)
    with torch.no_grad():
        assert torch.allclose(fused(X), expected, rtol=1e-4, atol=1e-4)


def test_training_containers_of_a_model_of_inference_mode() -> None:
    outcome = fuse(of_inference().train(), X, groups=PAIR, qat=True)
    assert (outcome.exit_code, outcome.status) == (0, "fused")
