"""A user's own fusers: called as torch.ao calls them, on copies, their mistakes reported with their names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import fusecli.nn
from fusecli import fuse, fuse_modules, verify
from fusecli.errors import RefusedError, UsageError
from tests import nets

X = nets.images(2, 3, 9, 8)
PAIR = (nn.Conv2d, nn.SiLU)


def joined(is_qat: bool, *modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


def not_a_module(is_qat: bool, conv: nn.Module, act: nn.Module) -> Any:
    return "fused"


def raising(is_qat: bool, conv: nn.Module, act: nn.Module) -> Any:
    raise ArithmeticError("no such thing")


def shape_changing(is_qat: bool, conv: Any, act: nn.Module) -> nn.Module:
    return nn.Sequential(conv, nn.MaxPool2d(2))


def wrong_input(is_qat: bool, conv: Any, act: nn.Module) -> nn.Module:
    return nn.Conv2d(conv.in_channels + 1, conv.out_channels, 3)


def no_tensor(is_qat: bool, conv: Any, act: nn.Module) -> nn.Module:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x

    return Pair()


def mutating(is_qat: bool, conv: Any, act: nn.Module) -> nn.Module:
    conv.weight.data.zero_()
    conv.weight = None
    conv.stride = (9, 9)
    conv._non_persistent_buffers_set.add("weight")
    raise ValueError("too late")


def negating(is_qat: bool, conv: Any, act: nn.Module) -> nn.Module:
    conv.weight.data.neg_()
    return nn.Sequential(conv, act)


def mapping(fuser: Any, sequence: Any = PAIR) -> dict[str, Any]:
    return {"additional_fuser_method_mapping": {sequence: fuser}}


def conv_silu() -> Any:
    return nets.chain(conv=nn.Conv2d(3, 6, 3), act=nn.SiLU())


MISTAKES = {
    not_a_module: "fuser not_a_module returned a str, not an nn.Module",
    raising: "fuser raising raised ArithmeticError: no such thing",
    shape_changing: r"fuser shape_changing returned changes the shape of the output from \[2, 6, 5, 5\]",
    wrong_input: "fuser wrong_input returned raises RuntimeError",
    no_tensor: "fuser no_tensor returned answers with a tuple",
    mutating: "fuser mutating raised ValueError",
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("fuser", MISTAKES, ids=lambda fuser: fuser.__name__)
def test_its_mistakes_carry_its_name_and_change_nothing(fuser: Any, inplace: bool) -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), act=nn.SiLU(), conv2=nn.Conv2d(6, 4, 3), bn2=nn.BatchNorm2d(4))
    before, expected = {key: value.clone() for key, value in net.state_dict().items()}, net(X)
    with pytest.raises(RefusedError, match=MISTAKES[fuser]):
        fuse_modules(net, [["conv2", "bn2"], ["conv", "act"]], inplace, None, mapping(fuser))
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert (net.conv.stride, type(net.bn2)) == ((1, 1), nn.BatchNorm2d)
    assert net.conv._non_persistent_buffers_set == set()
    assert torch.equal(net(X), expected)


@pytest.mark.parametrize("name", ["raising", "shape_changing", "not_a_module"])
def test_fuse_reports_its_mistakes(name: str) -> None:
    extra = {
        "sequence": ["torch.nn.Conv2d", "torch.nn.SiLU"],
        "fuser": f"tests.engine.test_custom_fusers:{name}",
    }
    spec = {"groups": [["conv", "act"]], "extra_mappings": [extra]}
    outcome = fuse(conv_silu(), X, spec=spec, allow_code=["tests"])
    (refused,) = outcome.refused
    assert (outcome.exit_code, refused.code, outcome.model) == (4, "fuser-error", None)
    assert name in refused.reason


def test_a_wrong_result_of_the_right_shape_is_different() -> None:
    extra = {
        "sequence": ["torch.nn.Conv2d", "torch.nn.SiLU"],
        "fuser": "tests.engine.test_custom_fusers:negating",
    }
    spec = {"groups": [["conv", "act"]], "extra_mappings": [extra]}
    outcome = fuse(conv_silu(), X, spec=spec, allow_code=["tests"])
    assert (outcome.exit_code, outcome.model) == (1, None)


def test_parametrized_modules_are_its_own_affair() -> None:
    net = conv_silu()
    parametrizations.weight_norm(net.conv)
    fused = fuse_modules(net, ["conv", "act"], False, None, mapping(joined, (type(net.conv), nn.SiLU)))
    assert torch.equal(fused(X), net(X))
    assert fused.conv[0].parametrizations.weight.original0 is not net.conv.parametrizations.weight.original0


@pytest.mark.parametrize("inplace", [False, True])
def test_what_it_returns_takes_the_place_of_the_first(inplace: bool) -> None:
    net = conv_silu()
    expected = net(X)
    fused = fuse_modules(net, ["conv", "act"], inplace, None, mapping(joined))
    assert [type(module).__name__ for module in fused.children()] == ["Sequential", "Identity"]
    assert list(fused.state_dict()) == ["conv.0.weight", "conv.0.bias"]
    assert torch.equal(fused(X), expected)
    assert (fused is net) == inplace


def test_fuse_proves_it() -> None:
    extra = {
        "sequence": ["torch.nn.Conv2d", "torch.nn.SiLU"],
        "fuser": "tests.engine.test_custom_fusers:joined",
    }
    spec = {"groups": [["conv", "act"]], "extra_mappings": [extra]}
    outcome = fuse(conv_silu(), X, spec=spec, allow_code=["tests"])
    assert (outcome.exit_code, outcome.groups[0].rule) == (0, "tests.engine.test_custom_fusers:joined")


def test_it_goes_before_a_rule_and_before_the_order_of_a_list() -> None:
    made: list[tuple[type, ...]] = []

    def note(is_qat: bool, *modules: nn.Module) -> nn.Module:
        made.append(tuple(type(module) for module in modules))
        return nn.Sequential(*modules)

    pair, turned = (nn.Conv2d, nn.BatchNorm2d), (nn.BatchNorm2d, nn.Conv2d)
    fuse_modules(nets.conv_bn(), ["conv", "bn"], False, None, mapping(note, pair))
    net = nets.chain(bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 6, 3))
    fuse_modules(net, ["bn", "conv"], False, None, mapping(note, turned))
    assert made == [pair, turned]


def test_only_the_exact_classes_are_its_own() -> None:
    net = nets.chain(conv=nets.SamePadConv2d(3, 6, 3), act=nn.SiLU())
    with pytest.raises(RefusedError, match="no rule fuses SamePadConv2d -> SiLU"):
        fuse_modules(net, ["conv", "act"], False, None, mapping(joined))


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_of_first_and_last_move_onto_its_result_once(inplace: bool) -> None:
    net, calls = conv_silu(), []
    net.conv.register_forward_pre_hook(lambda *_: calls.append("pre"))
    net.act.register_forward_hook(lambda *_, **__: calls.append("post"), with_kwargs=True)
    fused = fuse_modules(net, ["conv", "act"], inplace, None, mapping(joined))
    assert calls == []
    fused(X)
    assert calls == ["pre", "post"]


def test_a_fuser_of_torch_ao_gives_what_torch_ao_gives(torch_ao: Any) -> None:
    def fuser(is_qat: bool, conv: nn.Module, relu: nn.Module) -> nn.Module:
        return fusecli.nn.ConvReLU2d(conv, relu)

    net = nets.chain(conv=nn.Conv2d(3, 6, 3), relu=nn.ReLU())
    config = mapping(fuser, (nn.Conv2d, nn.ReLU))
    theirs = torch_ao(net, ["conv", "relu"], fuse_custom_config_dict=config)
    ours = fuse_modules(net, ["conv", "relu"], fuse_custom_config_dict=config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(X), theirs(X))


def swapped_in(modules: list[nn.Module], is_qat: bool, additional: Any) -> list[nn.Module]:
    assert (is_qat, additional) == (False, {PAIR: joined})
    return [nn.Sequential(*modules), *(nn.Identity() for _ in modules[1:])]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("groups", [["conv", "act"], [["conv", "act"]]], ids=str)
def test_fuser_func_as_in_torch_ao(torch_ao: Any, groups: Any, inplace: bool) -> None:
    net = conv_silu()
    options = {"fuser_func": swapped_in, "fuse_custom_config_dict": mapping(joined)}
    theirs = torch_ao(net, groups, **options)
    expected = net(X)
    ours = fuse_modules(net, groups, inplace, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours(X), expected)
    assert ((ours is net), type(net.act) is nn.Identity) == (inplace, inplace)


def test_verify_judges_by_outputs_alone_what_a_custom_fuser_took_part_in() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), conv2=nn.Conv2d(6, 6, 3), act=nn.SiLU())
    pair, custom = ["conv", "bn"], (["conv2", "act"], False, None, mapping(joined))
    for fused in (
        fuse_modules(fuse_modules(net, pair), *custom),
        fuse_modules(fuse_modules(net, *custom), pair),
        fuse_modules(
            fuse_modules(net, pair), custom[0], fuser_func=swapped_in, fuse_custom_config_dict=custom[3]
        ),
    ):
        assert verify(net, fused, X).equivalent
        fused.conv.weight.data.mul_(1.001)
        assert not verify(net, fused, X).equivalent


def test_a_fuser_func_that_returns_too_few() -> None:
    net = conv_silu()
    with pytest.raises(UsageError, match="returned 1 modules for 2"):
        fuse_modules(net, ["conv", "act"], True, fuser_func=lambda modules, *_: modules[:1])
    assert type(net.act) is nn.SiLU


@pytest.mark.parametrize("key", [(nn.SiLU,), nn.SiLU], ids=["sequence", "class"])
def test_a_group_of_one_for_a_fuser_of_one_class(key: Any) -> None:
    net = conv_silu()
    fused = fuse_modules(net, [["act"]], False, None, mapping(lambda is_qat, act: nn.Sequential(act), key))
    assert type(fused.act[0]) is nn.SiLU
    for options in ({}, {"fuse_custom_config_dict": mapping(joined)}):
        with pytest.raises(UsageError, match="a group needs at least two names"):
            fuse_modules(net, [["act"]], **options)


def test_groups_beside_a_spec_that_takes_single_modules() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), drop=nn.Dropout())
    outcome = fuse(net, X, groups=[["conv", "bn"], ["drop"]], spec={"remove_idle": True})
    assert (outcome.exit_code, [group.modules for group in outcome.groups]) == (
        0,
        [("conv", "bn"), ("drop",)],
    )
    assert type(outcome.model.drop) is nn.Identity


def only_float32(is_qat: bool, conv: Any, norm: Any) -> nn.Module:
    assert conv.weight.dtype is torch.float32, "this is made for float32"
    return torch.nn.utils.fuse_conv_bn_eval(conv, norm)


def test_a_fuser_that_does_not_fold_in_float64_cannot_be_proven() -> None:
    model = nets.randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 0)
    spec = {
        "groups": [["0", "1"]],
        "extra_mappings": [
            {"sequence": ["torch.nn.Conv2d", "torch.nn.BatchNorm2d"], "fuser": f"{__name__}:only_float32"}
        ],
    }
    with pytest.raises(RefusedError, match=r"0 \+ 1: it cannot be proven, .* float64: .*made for float32"):
        fuse(model, X, spec=spec, allow_code=["tests"])
