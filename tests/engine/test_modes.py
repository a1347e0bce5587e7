"""Training flags and requires_grad: what a fusion sets, keeps and lists."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from fusecli import fuse, fuse_modules
from tests import nets

X = nets.images(2, 3, 9, 8)
PAIR = ["conv1", "bn1"]


def test_case_39_nothing_is_listed_for_a_model_in_eval_mode(caplog: pytest.LogCaptureFixture) -> None:
    outcome = fuse(nets.two_pairs(), X, groups=PAIR)
    fuse_modules(nets.two_pairs(), PAIR)
    assert [entry for entry in outcome.ledger if entry.kind == "train-mode"] == []
    assert caplog.records == []


@pytest.mark.parametrize("where", ["", "bn1", "bn2"])
def test_case_39_train_mode_is_left_and_listed(where: str) -> None:
    net = nets.two_pairs()
    expected = net(X)
    net.get_submodule(where).train()
    outcome = fuse(net, X, groups=PAIR)
    listed = [entry.where for entry in outcome.ledger if entry.kind == "train-mode"]
    assert listed == ([where] if where else ["conv1", "bn1", "relu1", "conv2", "bn2"])
    assert outcome.exit_code == 0
    assert not any(module.training for module in outcome.model.modules())
    assert torch.allclose(outcome.model(X), expected, rtol=1e-4, atol=1e-3)
    assert net.get_submodule(where).training


@pytest.mark.parametrize("inplace", [False, True])
def test_case_39_fuse_modules_says_so_in_the_log(inplace: bool, caplog: pytest.LogCaptureFixture) -> None:
    net = nets.two_pairs()
    net.bn1.train()
    fused = fuse_modules(net, PAIR, inplace=inplace)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("fusecli", logging.WARNING)
    assert "set to eval: bn1" in record.getMessage()
    assert not any(module.training for module in fused.modules())


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_case_41_requires_grad_follows_the_weight(bias: bool, wanted: bool) -> None:
    net = nets.conv_bn(bias=bias).requires_grad_(wanted)
    outcome = fuse(net, X, groups=["conv", "bn"])
    for fused in (
        fuse_modules(net, ["conv", "bn"]),
        outcome.model,
        fuse_modules(net, ["conv", "bn"], inplace=True),
    ):
        assert [p.requires_grad for p in fused.parameters()] == [wanted, wanted]
        assert all(type(p) is nn.Parameter and p.is_leaf for p in fused.parameters())


def test_case_41_a_bias_that_was_there_keeps_its_own() -> None:
    net = nets.conv_bn()
    net.conv.weight.requires_grad_(False)
    fused = fuse_modules(net, ["conv", "bn"])
    assert (fused.conv.weight.requires_grad, fused.conv.bias.requires_grad) == (False, True)


def test_case_41_torch_ao_freezes_the_new_bias(torch_ao: Any) -> None:
    net = nets.conv_bn(bias=False)
    theirs, ours = torch_ao(net, ["conv", "bn"]), fuse_modules(net, ["conv", "bn"])
    assert [fused.conv.bias.requires_grad for fused in (ours, theirs)] == [True, False]
