"""Classes whose forward nobody has read: proven by a float64 probe of the group, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusecli import fuse, fuse_modules
from fusecli.errors import RefusedError
from tests import nets
from tests.proof.nets import PAIR
from tests.proof.nets import net as wired
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


class ClampingNorm(nn.BatchNorm2d):
    """What of its input is beyond 50 is cut: no standard normal number is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-50, 50))


class ClampingConv2d(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).clamp(-50, 50)


class ShrinkingNorm(nn.BatchNorm2d):
    """What is nearly nothing becomes nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return torch.where(x.abs() < 1e-4, torch.zeros_like(y), y)


class OddPadConv2d(nn.Conv2d):
    """Pads with ones behind what is odd in one direction, so a shift behind it does not reach them."""

    def __init__(self, *args: int, axis: int, odd: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.axis, self.odd = axis, odd

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y.abs() if x.shape[self.axis] % 2 == self.odd else y


def probed(conv: nn.Module, norm: nn.Module | None = None) -> None:
    fuse_modules(nets.chain(conv=conv, bn=norm or nn.BatchNorm2d(6)), PAIR)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (2, 2), (3, 1), (3, 2), (4, 4)])
def test_every_axis_is_even_and_odd(kernel: int, stride: int, odd: int, axis: int) -> None:
    with pytest.raises(RefusedError, match="OddPadConv2d computes something else"):
        probed(OddPadConv2d(3, 6, kernel, stride=stride, axis=axis, odd=odd))


def test_numbers_of_every_size() -> None:
    layer = nn.Conv2d(3, 6, 3, bias=False)  # so that what it gives may be small
    for odd in (ClampingNorm(6), ShrinkingNorm(6)):
        with pytest.raises(RefusedError, match=f"{type(odd).__name__} computes something else"):
            probed(layer, odd)
    with pytest.raises(RefusedError, match="ClampingConv2d computes something else"):
        probed(ClampingConv2d(3, 6, 3))


def test_a_norm_that_clamps_in_front_of_a_layer() -> None:
    """No chain: there each member is probed by itself."""
    net = wired(lambda m, x: m.conv(m.bn(torch.relu(x))), bn=ClampingNorm(3), conv=nn.Conv2d(3, 6, 3))
    assert [no.code for no in fuse(net, X, groups=["bn", "conv"]).refused] == ["not-affine"]


def test_a_norm_that_is_nan_for_large_numbers_is_proven_on_the_others() -> None:
    class Overflowing(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y + (y - y) * (x.abs() * 1e306)  # inf - inf where numbers are large

    probed(nn.Conv2d(3, 6, 3), Overflowing(6))


def clamped(self: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> Any:
    return nn.Conv2d._conv_forward(self, x, weight, bias).clamp(-1, 1)


def test_any_method_on_the_instance_makes_it_a_stranger() -> None:
    conv = nn.Conv2d(3, 6, 3)
    conv._conv_forward = lambda x, weight, bias: clamped(conv, x, weight, bias)
    with pytest.raises(RefusedError, match="a float64 probe disproves the fold: Conv2d"):
        probed(conv)
    norm = nn.BatchNorm2d(6)
    norm._check_input_dim = lambda x: x.clamp_(-1, 1)
    with pytest.raises(RefusedError, match="a float64 probe disproves the fold: BatchNorm2d"):
        probed(nn.Conv2d(3, 6, 3), norm)


def test_a_method_on_the_instance_that_does_the_same_is_proven() -> None:
    harmless = nn.Conv2d(3, 6, 3)
    harmless._conv_forward = lambda x, w, b: nn.functional.conv2d(x, w, b)
    probed(harmless)


@pytest.mark.parametrize("cls", [nn.Dropout, nn.Identity, nn.ReLU])
def test_what_does_nothing_by_its_class_may_be_made_to_do_something(cls: type[nn.Module]) -> None:
    module = cls()
    module.forward = lambda x: x * 2 + 1
    chain = nets.chain(conv=nn.Conv2d(3, 6, 3), between=module, bn=nn.BatchNorm2d(6))
    with pytest.raises(RefusedError, match="no rule"):
        fuse_modules(chain, ["conv", "between", "bn"])
    behind = nets.chain(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6), act=module)
    fused = fuse_modules(behind, ["conv", "bn", "act"])
    torch.testing.assert_close(fused(X), behind(X), rtol=1e-4, atol=1e-4)


def test_a_pooling_that_was_made_to_do_something_is_not_idle() -> None:
    pool = nn.AvgPool2d(1)
    pool.forward = lambda x: x + 1  # type: ignore[method-assign]
    net = wired(lambda m, x: torch.relu(m.pool(x)), pool=pool)
    assert fuse(net, X, spec={"remove_idle": True}).status == "nothing to fuse"
