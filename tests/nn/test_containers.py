from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fusecli.nn as fused_nn
from fusecli.nn import FusedModule, container_for

# Name, first module, input shape.
LAYERS = [
    ("ConvReLU1d", nn.Conv1d(3, 4, 3), (2, 3, 6)),
    ("ConvReLU2d", nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    ("ConvReLU3d", nn.Conv3d(3, 4, 3), (2, 3, 6, 6, 6)),
    ("LinearReLU", nn.Linear(3, 4), (2, 3)),
    ("BNReLU1d", nn.BatchNorm1d(3), (2, 3, 6)),
    ("BNReLU2d", nn.BatchNorm2d(3), (2, 3, 6, 6)),
    ("BNReLU3d", nn.BatchNorm3d(3), (2, 3, 6, 6, 6)),
]
NAMES = [name for name, _, _ in LAYERS]


def intrinsic(name: str) -> Any:
    """The class of torch.ao; deprecated, so a warning on import would be no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module("torch.ao.nn.intrinsic"), name, None)


@pytest.mark.parametrize(("name", "first", "shape"), LAYERS, ids=NAMES)
def test_container_runs_the_layer_then_the_relu(name: str, first: nn.Module, shape: tuple[int, ...]) -> None:
    container, x = getattr(fused_nn, name)(first, nn.ReLU()).eval(), torch.randn(shape)
    assert torch.equal(container(x), first(x).relu())
    assert (first(x) < 0).any()


@pytest.mark.parametrize(("name", "first", "shape"), LAYERS, ids=NAMES)
def test_state_dicts_are_interchangeable_with_torch_ao(
    name: str, first: nn.Module, shape: tuple[int, ...]
) -> None:
    theirs_class = intrinsic(name)
    if theirs_class is None:
        assert name == "BNReLU1d", "only BNReLU1d is without a counterpart in torch.ao"
        return
    ours = getattr(fused_nn, name)(copy.deepcopy(first), nn.ReLU()).eval()
    theirs = theirs_class(copy.deepcopy(first), nn.ReLU()).eval()
    for tensor in theirs.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [key for key, _ in ours.named_children()] == [key for key, _ in theirs.named_children()]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(("name", "first", "shape"), LAYERS, ids=NAMES)
def test_container_for_finds_the_class(name: str, first: nn.Module, shape: tuple[int, ...]) -> None:
    found = container_for(first, nn.ReLU())
    assert found is getattr(fused_nn, name)
    assert issubclass(found, FusedModule)


@pytest.mark.parametrize(
    "first", [nn.ConvTranspose2d(3, 4, 3), nn.LayerNorm(4), nn.SyncBatchNorm(4), nn.Identity()], ids=repr
)
def test_container_for_knows_no_class_for_the_rest(first: nn.Module) -> None:
    assert container_for(first, nn.ReLU()) is None


class PaddingConv(nn.Conv2d):
    """A subclass, as model code has them."""


class QuietReLU(nn.ReLU):
    """A subclass of the activation."""


def test_subclasses_are_taken() -> None:
    container = fused_nn.ConvReLU2d(PaddingConv(3, 4, 3), QuietReLU())
    assert container_for(container[0], nn.ReLU()) is fused_nn.ConvReLU2d


@pytest.mark.parametrize(
    "modules",
    [
        (),
        (nn.Conv2d(1, 1, 1),),
        (nn.Conv1d(1, 1, 1), nn.ReLU()),
        (nn.Conv2d(1, 1, 1), nn.ReLU6()),
        (nn.ReLU(), nn.Conv2d(1, 1, 1)),
        (nn.Conv2d(1, 1, 1), nn.ReLU(), nn.ReLU()),
    ],
)
def test_other_types_are_refused_by_name(modules: tuple[nn.Module, ...]) -> None:
    given = ", ".join(type(module).__name__ for module in modules)
    with pytest.raises(TypeError) as mistake:
        fused_nn.ConvReLU2d(*modules)
    assert str(mistake.value) == f"ConvReLU2d takes (Conv2d, ReLU), not ({given})"


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_follows_the_first_member(training: bool) -> None:
    first, relu = nn.BatchNorm2d(3).train(training), nn.ReLU()
    container = fused_nn.BNReLU2d(first, relu)
    assert container.training is first.training is training
    assert relu.training is True


def test_a_container_can_be_copied() -> None:
    container = fused_nn.ConvReLU2d(nn.Conv2d(3, 4, 3), nn.ReLU())
    twin = copy.deepcopy(container)
    assert type(twin) is fused_nn.ConvReLU2d
    assert torch.equal(twin[0].weight, container[0].weight)


def test_torch_ao_is_never_imported() -> None:
    # torch itself imports parts of torch.ao, so what matters is what comes on top of it.
    program = (
        "import sys, torch; before = set(sys.modules); import fusecli.nn;"
        "print([name for name in set(sys.modules) - before if name.startswith('torch.ao')])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
