from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from tests.nets import float64
from tests.proof.nets import X, bn, conv, net
from tests.rules.side_by_side import relative_error
from tests.rules.wired import classes, left


def again(m: Any, x: Tensor) -> Tensor:
    for norm in m.bns:
        x = torch.relu(norm(m.conv(x)))
    return x


def shared(wiring: Any = again, layer: nn.Module | None = None, norms: int = 3, **modules: Any) -> Any:
    bns = nn.ModuleList(bn() for _ in range(norms))
    return net(wiring, conv=layer or conv(bias=False), bns=bns, **modules)


def cloned(model: nn.Module, x: Any = X) -> Any:
    return fusecli.fuse(model, x, discover=True, shared="clone")


def test_it_has_to_be_allowed() -> None:
    assert left(shared(), X) == "shared-module"


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: again(m, x) + m.conv(x).sigmoid(),
        lambda m, x: (lambda y: torch.tanh(m.bns[0](y)) + torch.tanh(m.bns[1](m.conv(y))) + y)(m.conv(x)),
        lambda m, x: (
            torch.tanh(m.bns[0](m.conv(x))) * torch.tanh(m.bns[1](m.conv(x))) * torch.tanh(m.bns[1](x))
        ),
        lambda m, x: torch.tanh(m.bns[0](m.conv(x))) * torch.tanh(m.bns[1](torch.relu(m.conv(x)))),
    ],
    ids=[
        "a call without a norm",
        "another reader",
        "a norm behind something else too",
        "an activation between",
    ],
)
def test_refused(wiring: Any) -> None:
    outcome = cloned(shared(wiring))
    assert outcome.groups == ()
    assert "shared-module" in {norm.code for norm in outcome.unfused}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_a_copy_for_each_norm(bias: bool, affine: bool) -> None:
    model = shared(layer=conv(bias=bias))
    if not affine:
        model.bns[1] = nn.BatchNorm2d(3, affine=False)
    model = float64(model)
    outcome = cloned(model, X.double())
    assert [(group.rule, group.status) for group in outcome.groups] == [("shared_layer_bn", "equivalent")]
    fused = outcome.model
    assert classes(fused, "conv", "bns.0", "bns.1", "bns.2") == ["Identity", "Conv2d", "Conv2d", "Conv2d"]
    assert sorted(fused.state_dict()) == [f"bns.{i}.{name}" for i in range(3) for name in ("bias", "weight")]
    for x in (X, torch.randn(1, 3, 5, 6)):
        assert relative_error(fused(x.double()), model(x.double())) < 1e-12
    assert fusecli.verify(model, fused, X.double()).equivalent
    assert cloned(fused, X.double()).groups == ()


def test_linear_and_transposed_layers() -> None:
    layer = nn.ConvTranspose2d(3, 3, 3, padding=1)
    assert [group.rule for group in cloned(shared(layer=layer)).groups] == ["shared_layer_bn"]
    bns = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(2))
    model = net(again, conv=nn.Linear(4, 4), bns=bns)
    assert [group.rule for group in cloned(model, torch.randn(5, 4)).groups] == ["shared_layer_bn"]


def test_one_norm_behind_every_call_needs_no_copy() -> None:
    model = net(lambda m, x: torch.relu(m.bn(m.conv(torch.relu(m.bn(m.conv(x)))))), conv=conv(), bn=bn())
    (group,) = cloned(model).groups
    assert (group.rule, classes(cloned(model).model, "conv", "bn")) == ("conv_bn", ["Conv2d", "Identity"])
