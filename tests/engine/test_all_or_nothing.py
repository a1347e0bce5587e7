"""All groups are checked before the first is applied, and a copy shares nothing with its original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusecli import fuse, fuse_modules
from fusecli.errors import RefusedError, UsageError
from tests import nets

X = nets.images(2, 3, 9, 8)
GROUPS = [["conv1", "bn1", "relu1"], ["conv2", "bn2"]]


def wider_norm(net: Any) -> None:
    net.bn2 = nn.BatchNorm2d(5).eval()


def negative_variance(net: Any) -> None:
    net.bn2.running_var[1] = -1.0


def overflowing(net: Any) -> None:
    net.half().bn2.weight.data.fill_(6e4)
    net.conv2.weight.data.fill_(6e4)


def no_statistics(net: Any) -> None:
    net.bn2 = nn.BatchNorm2d(4, track_running_stats=False).eval()


def weight_standardising(net: Any) -> None:
    net.conv2 = nets.randomise(nets.StandardisedConv2d(6, 4, 3), 0)


DAMAGE = (wider_norm, negative_variance, overflowing, no_statistics, weight_standardising)


def state(net: nn.Module) -> list[Any]:
    """Everything that a fusion could change, by identity where it has one."""
    modules = [(path, id(module), type(module), module.training) for path, module in net.named_modules()]
    tensors = [
        (n, id(p), p.data_ptr(), p._version) for n, p in (*net.named_parameters(), *net.named_buffers())
    ]
    hooks = [(*module._forward_pre_hooks, *module._forward_hooks) for module in net.modules()]
    return [modules, tensors, hooks, sorted(net.__dict__)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_case_42_second_group_fails(damage: Any, inplace: bool, training: bool) -> None:
    net = nets.two_pairs()
    damage(net)
    net.train(training)
    net.conv1.register_forward_pre_hook(lambda *_: None)
    net.relu1.register_forward_hook(lambda *_: None)
    before, values = state(net), {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(RefusedError):
        fuse_modules(net, GROUPS, inplace=inplace)
    assert state(net) == before
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in values.items())


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("second", [["conv2", "bn9"], ["bn2", "conv2"], ["bn1", "conv2"]], ids=str)
def test_case_42_second_group_is_a_slip(second: list[str], inplace: bool) -> None:
    net = nets.two_pairs()
    before = state(net)
    with pytest.raises(UsageError):
        fuse_modules(net, [GROUPS[0], second], inplace=inplace)
    assert state(net) == before


def test_case_42_torch_ao_leaves_it_half_fused(torch_ao: Any) -> None:
    net = nets.two_pairs()
    net.bn2 = nn.BatchNorm2d(5).eval()
    with pytest.raises(RuntimeError):
        torch_ao(net, GROUPS, inplace=True)
    assert type(net.bn1) is nn.Identity


def test_case_42_fuse_names_every_group_that_fails() -> None:
    net = nets.two_pairs()
    net.bn1.running_var[0] = float("nan")
    net.bn2.running_var[1] = -1.0
    outcome = fuse(net, X, groups=GROUPS)
    assert [refused.group for refused in outcome.refused] == [tuple(group) for group in GROUPS]
    assert (outcome.model, outcome.groups) == (None, ())


def pointers(net: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}


@pytest.mark.parametrize("groups", [GROUPS, GROUPS[:1], GROUPS[1:], [["conv1", "bn1"]]], ids=str)
def test_a_copy_shares_nothing_and_changes_nothing(groups: list[list[str]]) -> None:
    net = nets.two_pairs().train()
    before, values = state(net), {key: value.clone() for key, value in net.state_dict().items()}
    fused = fuse_modules(net, groups)
    assert not pointers(net) & pointers(fused)
    assert not {id(p) for p in net.parameters()} & {id(p) for p in fused.parameters()}
    for tensor in (*fused.parameters(), *fused.buffers()):
        tensor.data.zero_()
    assert state(net) == before
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in values.items())


def test_the_outcome_of_fuse_shares_nothing_with_the_model() -> None:
    net = nets.two_pairs()
    before = state(net)
    outcome = fuse(net, X, groups=GROUPS)
    assert not pointers(net) & pointers(outcome.model)
    assert state(net) == before


def test_weights_that_are_replaced_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    net, copied = nets.two_pairs(), []
    plain = nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda p, memo: copied.append(p) or plain(p, memo))
    fuse_modules(net, GROUPS)
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)] for p in copied} == {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}


def test_in_place_means_the_same_model_with_new_layers() -> None:
    net = nets.two_pairs()
    conv1, conv2, expected = net.conv1, net.conv2, net(X)
    weights = conv1.weight.clone(), conv2.weight.clone()
    assert fuse_modules(net, GROUPS, inplace=True) is net
    # Whoever holds the old ones has them as they were.
    assert (net.conv1[0] is conv1, net.conv2 is conv2) == (False, False)
    assert torch.equal(conv1.weight, weights[0])
    assert torch.equal(conv2.weight, weights[1])
    assert conv2.bias is None
    assert torch.allclose(net(X), expected, rtol=1e-4, atol=1e-3)
