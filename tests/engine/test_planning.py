"""Which rule takes a group, what stays, and what is a slip of the list rather than an unsound fold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusecli import fuse, fuse_modules
from fusecli.engine import Group, plan
from fusecli.errors import RefusedError, UsageError
from fusecli.rewrite import ModuleTree
from tests import nets

X = nets.images(2, 3, 9, 8)


@pytest.mark.parametrize("between", [nets.AlwaysDropout(), nn.MaxPool2d(1), nn.Sequential(nn.Identity())])
def test_what_acts_between_is_refused(between: nn.Module) -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), between=between, bn=nn.BatchNorm2d(6))
    with pytest.raises(
        RefusedError, match=f"no rule fuses Conv2d -> {type(between).__name__} -> BatchNorm2d"
    ):
        fuse_modules(net, ["conv", "between", "bn"])


@pytest.mark.parametrize(
    ("listed", "right"),
    [
        (["bn", "conv"], "conv, bn"),
        (["bn", "conv", "relu"], "conv, bn, relu"),
        (["relu", "bn", "conv"], "conv, bn, relu"),
        (["conv", "relu", "bn"], "conv, bn, relu"),
        (["relu", "conv"], "conv, relu"),
        (["relu", "bn"], "bn, relu"),
    ],
    ids=str,
)
def test_case_17_wrong_order(listed: list[str], right: str) -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), relu=nn.ReLU())
    for attempt in (lambda: fuse_modules(net, listed), lambda: fuse(net, X, groups=listed)):
        with pytest.raises(UsageError, match="wrong order") as slip:
            attempt()
        assert slip.value.problems[0].fix == f"did you mean [{right}]?"


def test_case_17_all_slips_at_once_and_nothing_is_fused() -> None:
    net = nets.two_pairs()
    with pytest.raises(UsageError) as slip:
        fuse_modules(net, [["bn1", "conv1"], ["bn2", "conv2"]], inplace=True)
    assert [problem.where for problem in slip.value.problems] == ["groups[0]", "groups[1]"]
    assert type(net.bn1) is nn.BatchNorm2d


def test_a_norm_behind_a_fused_pair_needs_a_run() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), again=nn.BatchNorm2d(6))
    with pytest.raises(RefusedError, match="no rule takes again") as refused:
        fuse_modules(net, ["conv", "bn", "again"])
    assert "group of its own" in refused.value.problems[0].fix
    (group,) = fuse(net, X, groups=["conv", "bn", "again"]).groups
    assert (group.rule, group.status) == ("bn_bn+conv_bn", "equivalent")


def test_a_single_module_is_no_group() -> None:
    with pytest.raises((RefusedError, UsageError)):
        fuse_modules(nets.conv_bn(), ["bn"])


@pytest.mark.parametrize(
    "between", [nn.Dropout(), nn.Dropout2d(0.9), nn.AlphaDropout(), nn.Identity()], ids=repr
)
def test_case_06_dropout_or_identity_between(between: nn.Module) -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), between=between, bn=nn.BatchNorm2d(6), relu=nn.ReLU())
    group = ["conv", "between", "bn", "relu"]
    outcome = fuse(net, X, groups=group)
    (report,) = outcome.groups
    assert (outcome.exit_code, report.rule, report.kept) == (0, "conv_bn_relu", ("between",))
    assert outcome.verification.float64_error < 1e-12
    assert type(outcome.model.between) is type(between)


def test_case_06_in_the_middle_of_the_train_mode() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), between=nn.Dropout(0.9), bn=nn.BatchNorm2d(6)).train()
    fused = fuse_modules(net, ["conv", "between", "bn"])
    assert torch.allclose(fused(X), net.eval()(X), atol=1e-4)


def test_the_longest_rule_wins() -> None:
    net = nets.two_pairs()
    groups = [Group(("conv1", "bn1", "relu1")), Group(("conv1", "bn1")), Group(("conv1", "relu1"))]
    rules = [plan(ModuleTree(net), [group]).decisions[0].rule for group in groups]
    assert rules == ["conv_bn_relu", "conv_bn", "conv_relu"]


def test_planning_needs_no_numbers() -> None:
    net = nets.two_pairs().to("meta")
    planned = plan(ModuleTree(net), [Group(("conv1", "bn1", "relu1")), Group(("conv2", "bn2"))])
    rewrites = [d.rewrite({path: net.get_submodule(path) for path in d.members}) for d in planned.decisions]
    assert [len(rewrite.tensors) for rewrite in rewrites] == [2, 2]
    assert all(tensor.is_meta for rewrite in rewrites for tensor in rewrite.tensors.values())
