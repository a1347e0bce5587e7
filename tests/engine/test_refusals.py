"""Members that the model knows under more than one name, and weights that are computed from other tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fusecli import fuse, fuse_modules
from fusecli.engine import Group, Vocabulary, plan
from fusecli.errors import NotFoldable, RefusedError, UsageError
from fusecli.rewrite import ModuleTree
from tests import nets

X = nets.images(2, 3, 9, 8)


def refusal(net: nn.Module, group: list[str]) -> Any:
    outcome = fuse(net, X, groups=group)
    assert (outcome.exit_code, outcome.model) == (4, None)
    return outcome.refused[0]


@pytest.mark.parametrize("shared", ["conv1", "bn1"])
def test_case_14_an_alias(shared: str) -> None:
    net = nets.two_pairs()
    net.alias = net.get_submodule(shared)
    refused = refusal(net, ["conv1", "bn1"])
    assert (refused.code, f"{shared} is the same module" in refused.reason) == ("shared-module", True)


def test_case_14_an_alias_of_the_whole_block() -> None:
    net = nn.ModuleDict({"block": nets.conv_bn()})
    net["twin"] = net["block"]
    with pytest.raises(RefusedError, match=r"block\.conv is the same module as another name"):
        fuse_modules(net, ["block.conv", "block.bn"])


def test_case_15_tied_weights() -> None:
    net = nets.chain(a=nn.Conv2d(3, 3, 3, padding=1), b=nn.Conv2d(3, 3, 3, padding=1), bn=nn.BatchNorm2d(3))
    net.b.weight = net.a.weight
    refused = refusal(net, ["b", "bn"])
    assert refused.code == "tied-weights"
    assert "b.weight is the same memory" in refused.reason
    assert "clone" in refused.remedy


def test_case_16_a_weight_that_the_model_keeps_for_itself() -> None:
    net = nets.two_pairs()
    net.register_parameter("own", net.conv1.weight)
    assert refusal(net, ["conv1", "bn1"]).code == "tied-weights"


def test_a_relu_used_in_many_places_is_no_obstacle() -> None:
    net = nets.two_pairs()
    net.relu2 = net.relu1
    fused = fuse_modules(net, ["conv1", "bn1", "relu1"])
    assert type(fused.relu2) is nn.ReLU
    assert torch.allclose(fused(X), net(X), atol=1e-3)


PARAMETRIZED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "weight_norm": (nn.utils.parametrizations.weight_norm, "parametrize.remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrize.remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "parametrize.remove_parametrizations"),
    "old spectral_norm": (nn.utils.spectral_norm, "utils.remove_spectral_norm"),
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
    "pruned bias": (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), "prune.remove"),
    "any": (
        lambda m: parametrize.register_parametrization(m, "weight", nn.Tanh()),
        "remove_parametrizations",
    ),
}


@pytest.mark.parametrize("how", PARAMETRIZED)
@pytest.mark.parametrize("layer", ["conv", "linear"])
def test_case_29_parametrized(layer: str, how: str) -> None:
    computed, remover = PARAMETRIZED[how]
    plain, norm = (
        (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)) if layer == "conv" else (nn.Linear(3, 6), nn.BatchNorm1d(6))
    )
    net = nets.randomise(nn.ModuleDict({"layer": plain, "bn": norm}), 0)
    net["layer"] = computed(net["layer"])
    with pytest.raises(RefusedError, match="computed from other tensors") as no:
        fuse_modules(net, ["layer", "bn"])
    assert remover in no.value.problems[0].fix
    assert ("bias" in no.value.problems[0].fix) == (how == "pruned bias")


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_case_29_old_weight_norm() -> None:
    net = nets.conv_bn()
    net.conv = nn.utils.weight_norm(net.conv)
    refused = refusal(net, ["conv", "bn"])
    assert (refused.code, "remove_weight_norm" in refused.remedy) == ("parametrized", True)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_case_29_a_parametrized_norm(name: str) -> None:
    net = nets.conv_bn()
    parametrize.register_parametrization(net.bn, name, nn.Tanh())
    assert refusal(net, ["conv", "bn"]).code == "parametrized"


def test_case_29_the_remedy_works() -> None:
    net = nets.conv_bn()
    net.conv = parametrizations.weight_norm(net.conv)
    parametrize.remove_parametrizations(net.conv, "weight")
    assert fuse(net, X, groups=["conv", "bn"]).exit_code == 0


def test_a_lazy_layer_has_no_shape_yet() -> None:
    net = nn.Sequential(nn.LazyConv2d(6, 3), nn.BatchNorm2d(6))
    with pytest.raises(RefusedError, match="no shape yet"):
        fuse_modules(net, ["0", "1"])


def test_codes_of_what_cannot_be_lifted() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(6, 3), nn.BatchNorm2d(6))
    shapeless = nn.Sequential(nets.ForeignConv(3, 6, 3), nn.BatchNorm2d(6)).eval()
    del shapeless[0].stride
    treat = Vocabulary(treat={nets.ForeignConv: nn.Conv2d})
    found = []
    for net in (lazy, shapeless):
        (decision,) = plan(ModuleTree(net), [Group(("0", "1"))], treat).decisions
        with pytest.raises(NotFoldable) as no:
            decision.rewrite({"0": net[0], "1": net[1]})
        found.append(no.value.code)
    assert found == ["uninitialised", "no-geometry"]


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(UsageError) as slip:
        fuse_modules(nets.two_pairs(), [["conv1", "bn1"], ["conv2", "bn3"], ["cnov2", "bn2"]])
    problems = [(problem.where, problem.what, problem.fix) for problem in slip.value.problems]
    assert [where for where, _, _ in problems] == ["groups[1][1]", "groups[2][0]"]
    assert ["bn3" in problems[0][1], "cnov2" in problems[1][1]] == [True, True]
    assert "bn" in problems[0][2]
    assert "conv2" in problems[1][2]
