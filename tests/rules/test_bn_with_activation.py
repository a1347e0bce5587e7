from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusecli import fuse, fuse_modules
from fusecli.errors import RefusedError
from tests import nets
from tests.rules.side_by_side import assert_exact, kinds

X = nets.images(2, 3, 9, 8)
LAYERS = {
    "conv": lambda: nn.Conv2d(3, 6, 3, bias=False),
    "same": lambda: nets.SamePadConv2d(3, 6, 4, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(3, 6, 3, stride=2),
}


def test_case_31_an_activation_that_no_submodule_shows() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nets.ReluNorm2d(6))
    (refused,) = fuse(net, X, groups=["conv", "bn"]).refused
    assert refused.code == "not-affine"
    assert refused.reason == "ReluNorm2d does more than scale and shift: aten.relu"
    assert "extra_mappings" in refused.remedy
    # Without a run, the probe finds it.
    with pytest.raises(RefusedError, match="ReluNorm2d computes something else"):
        fuse_modules(net, ["conv", "bn"])


def test_case_31_an_activation_before_the_norm() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nets.ActFirstNorm2d(6, nn.SiLU()))
    (refused,) = fuse(net, X, groups=["conv", "bn"]).refused
    assert refused.code == "not-affine"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Identity, lambda: nn.PReLU(6)])
def test_case_31_the_activation_stays(layer: str, act: Any) -> None:
    net = nets.chain(conv=LAYERS[layer](), bn=nets.BatchNormAct2d(6, act()))
    fused = assert_exact(net, X)
    assert kinds(fused)[2:] == ["Sequential", "Identity", type(net.bn.act).__name__]
    outcome = fuse(net, X, groups=["conv", "bn"])
    assert (outcome.exit_code, outcome.groups[0].rule) == (0, "bn_with_activation")


def test_case_31_prelu_keeps_its_key() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nets.BatchNormAct2d(6, nn.PReLU(6)))
    fused = fuse_modules(net, ["conv", "bn"])
    assert list(fused.state_dict()) == ["conv.weight", "conv.bias", "bn.act.weight"]
    assert torch.equal(fused.bn.act.weight, net.bn.act.weight)


def test_hooks_of_the_norm_see_what_the_activation_returns() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nets.BatchNormAct2d(6, nn.ReLU()))
    seen: list[torch.Tensor] = []
    net.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.bn.register_forward_hook(lambda _, __, output: seen.append(output))
    out = fuse_modules(net, ["conv", "bn"])(X)
    assert [tuple(tensor.shape) for tensor in seen] == [tuple(X.shape), tuple(out.shape)]
    assert seen[1] is out
