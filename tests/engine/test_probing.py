"""Classes whose forward nobody has read: proven by a float64 probe of the group, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusecli import fuse, fuse_modules
from fusecli.errors import RefusedError
from tests import nets
from tests.equivalence.nets import PAIR
from tests.equivalence.nets import net as wired
from tests.rules.side_by_side import assert_exact

X = nets.images(2, 3, 11, 10)


def refusal(conv: nn.Module, wiring: Any = lambda m, x: m.bn(m.conv(x))) -> Any:
    net = wired(wiring, conv=conv, bn=nn.BatchNorm2d(6))
    (refused,) = fuse(net, X, groups=["conv", "bn"]).refused
    return refused


@pytest.mark.parametrize("bias", [True, False])
def test_case_28_weight_standardisation(bias: bool) -> None:
    refused = refusal(nets.StandardisedConv2d(3, 6, 3, bias=bias))
    assert (refused.code, refused.rule) == ("not-linear-in-weight", "conv_bn")
    assert "StandardisedConv2d computes something else" in refused.reason
    assert refused.evidence[0].startswith("relative error")
    assert "extra_mappings" in refused.remedy


@pytest.mark.parametrize("bias", [True, False])
def test_case_28_a_bias_that_is_ignored(bias: bool) -> None:
    refused = refusal(nets.BiasBlindConv2d(3, 6, 3, bias=bias))
    assert refused.code == "bias-not-read"
    assert refused.evidence[0] == "BiasBlindConv2d read it in 0 of 1 calls"
    assert "extra_mappings" in refused.remedy
    # Without a run, the probe finds it.
    with pytest.raises(RefusedError, match="BiasBlindConv2d computes something else"):
        fuse_modules(nets.chain(conv=nets.BiasBlindConv2d(3, 6, 3, bias=bias), bn=nn.BatchNorm2d(6)), PAIR)


def test_a_class_that_does_not_run_in_a_row() -> None:
    net = wired(lambda m, x: m.bn(m.conv(x, 2.0)), conv=nets.BrokenConv2d(3, 6, 3), bn=nn.BatchNorm2d(6))
    with pytest.raises(RefusedError, match="BrokenConv2d could not be probed: TypeError"):
        fuse_modules(net, PAIR)
    # A run shows what no probe can: which weight is applied, and that nothing else is done with it.
    (group,) = fuse(net, X, groups=PAIR).groups
    assert group.status == "equivalent"


@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_case_27_same_padding_of_tensorflow(stride: int, kernel: int) -> None:
    net = nets.chain(conv=nets.SamePadConv2d(3, 6, kernel, stride=stride, bias=False), bn=nn.BatchNorm2d(6))
    fused = assert_exact(net, X)
    assert type(fused.conv) is nets.SamePadConv2d
    assert fuse(net, X, groups=["conv", "bn"]).exit_code == 0


def test_case_27_behind_an_activation_too() -> None:
    net = nets.chain(conv=nets.SamePadConv2d(3, 6, 4), bn=nn.BatchNorm2d(6), relu=nn.ReLU())
    assert type(assert_exact(net, X).conv[0]) is nets.SamePadConv2d


def test_a_probe_leaves_the_model_alone() -> None:
    class Counting(nn.Conv2d):
        def __init__(self, *args: int) -> None:
            super().__init__(*args)
            self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    net = nets.chain(conv=Counting(3, 6, 3), bn=nn.BatchNorm2d(6))
    net.conv.calls.zero_()
    net.conv.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    assert fuse_modules(net.double(), ["conv", "bn"]).conv.calls == 0
    assert net.conv.calls == 0


def test_a_forward_that_computes_in_float32() -> None:
    class Float32Norm(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.float()).to(x.dtype)

    net = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=Float32Norm(6))
    assert fuse(net, X, groups=["conv", "bn"]).exit_code == 0


@pytest.mark.parametrize(
    ("cls", "target"), [("ForeignConv", "torch.nn.Conv2d"), ("ForeignLinear", "torch.nn.Linear")]
)
def test_treat_says_what_a_foreign_class_is(cls: str, target: str) -> None:
    conv = cls == "ForeignConv"
    layer, norm = (
        (nets.ForeignConv(3, 6, 3), nn.BatchNorm2d) if conv else (nets.ForeignLinear(3, 6), nn.BatchNorm1d)
    )
    net, x = nets.chain(layer=layer, bn=norm(6)), X if conv else nets.images(4, 3)
    with pytest.raises(RefusedError, match="no rule"):
        fuse_modules(net, ["layer", "bn"])
    spec = {"groups": [["layer", "bn"]], "extra_mappings": [{"treat": f"tests.nets.{cls}", "as": target}]}
    outcome = fuse(net, x, spec=spec, allow_code=["tests"])
    assert (outcome.exit_code, type(outcome.model.layer).__name__) == (0, cls)
    assert outcome.verification.float64_error < 1e-12


def test_treat_that_is_not_true_is_refused() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 6, 3), act=nn.SiLU(), bn=nn.BatchNorm2d(6))
    treat = {"treat": "torch.nn.SiLU", "as": "torch.nn.BatchNorm2d"}
    outcome = fuse(net, X, spec={"groups": [["conv", "act"]], "extra_mappings": [treat]})
    assert (outcome.exit_code, outcome.refused[0].code) == (4, "no-statistics")
    treat = {"treat": "torch.nn.SiLU", "as": "torch.nn.Conv2d"}
    outcome = fuse(net, X, spec={"groups": [["act", "bn"]], "extra_mappings": [treat]})
    assert (outcome.exit_code, outcome.refused[0].code) == (4, "no-weight")


@pytest.mark.parametrize(
    "treat", [("tests.nets.ForeignConv", "torch.nn.Conv2d"), ("torch.nn.SiLU", "torch.nn.ReLU")], ids=str
)
def test_treat_makes_no_container(treat: tuple[str, str]) -> None:
    foreign = treat[0].endswith("ForeignConv")
    conv = nets.ForeignConv(3, 6, 3) if foreign else nn.Conv2d(3, 6, 3)
    net = nets.chain(conv=conv, bn=nn.BatchNorm2d(6), act=nn.ReLU() if foreign else nn.SiLU())
    mapping = {"treat": treat[0], "as": treat[1]}
    spec = {"groups": [["conv", "bn", "act"]], "extra_mappings": [mapping]}
    outcome = fuse(net, X, spec=spec, allow_code=["tests"])
    assert (outcome.exit_code, outcome.refused[0].code) == (4, "no-container")
