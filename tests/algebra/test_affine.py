from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor, nn

from fusecli.algebra import ChannelAffine, batch_norm
from fusecli.errors import NotFoldable
from tests.algebra.grid import affine, close, random

CHANNELS = 6
EPS = 1e-5


def statistics() -> dict[str, Tensor]:
    return {
        "mean": torch.linspace(-1, 1, CHANNELS),
        "var": torch.linspace(0.1, 2, CHANNELS),
        "gamma": torch.linspace(-1, 1.5, CHANNELS),
        "beta": torch.linspace(0.3, -2, CHANNELS),
    }


@pytest.mark.parametrize("spatial", [(), (3,), (3, 4), (3, 4, 2)])
def test_meaning_is_scale_and_shift_per_channel(spatial: tuple[int, ...]) -> None:
    f, x = affine(CHANNELS), random(2, CHANNELS, *spatial)
    for channel in range(CHANNELS):
        assert close(f(x)[:, channel], x[:, channel] * f.scale[channel] + f.shift[channel])


@pytest.mark.parametrize("affine_", [True, False])
def test_batch_norm_is_the_torch_module_in_eval_mode(affine_: bool) -> None:
    norm, given = nn.BatchNorm2d(CHANNELS, eps=1e-3, affine=affine_).double().eval(), statistics()
    norm.running_mean, norm.running_var = given["mean"].double(), given["var"].double()
    if affine_:
        norm.weight.data, norm.bias.data = given["gamma"].double(), given["beta"].double()
    f = batch_norm(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    x = random(2, CHANNELS, 3, 3)
    with torch.no_grad():
        assert close(f(x), norm(x))


def test_batch_norm_rounds_each_step_by_ieee_754() -> None:
    given = statistics()
    f = batch_norm(given["mean"], given["var"], 1e-5, given["gamma"], given["beta"])
    for channel in range(CHANNELS):
        mean, var, gamma, beta = (given[name][channel].item() for name in ("mean", "var", "gamma", "beta"))
        scale = gamma / math.sqrt(var + 1e-5)
        assert f.scale[channel].item() == scale
        assert f.shift[channel].item() == beta - mean * scale


def test_the_statistics_may_differ_in_dtype() -> None:
    given = statistics()
    mixed = batch_norm(given["mean"].half(), given["var"], 1e-5, given["gamma"].bfloat16())
    wide = batch_norm(
        given["mean"].half().double(), given["var"].double(), 1e-5, given["gamma"].bfloat16().double()
    )
    assert mixed.scale.dtype == torch.float64
    assert torch.equal(mixed.scale, wide.scale)
    assert torch.equal(mixed.shift, wide.shift)


@pytest.mark.parametrize("var", [0.0, 5e-324, 1e-45, 1e-310])
def test_case_34_zero_and_denormal_variance_are_exact(var: float) -> None:
    f = batch_norm(torch.ones(1), torch.tensor([var], dtype=torch.float64), EPS)
    with localcontext() as context:
        context.prec = 60
        exact = 1 / (Decimal(var) + Decimal(EPS)).sqrt()
    assert abs(Decimal(f.scale.item()) - exact) <= exact * Decimal(2) ** -52


def test_case_34_a_denormal_variance_without_eps_is_exact() -> None:
    f = batch_norm(torch.zeros(1), torch.tensor([2.0**-140]), 0.0)
    assert f.scale.item() == 2.0**70


def test_case_34_gamma_zero_and_negative() -> None:
    f = batch_norm(torch.tensor([3.0, 3.0]), torch.tensor([4.0, 4.0]), 0.0, torch.tensor([0.0, -2.0]))
    assert f.scale.tolist() == [0.0, -1.0]
    assert f.shift.tolist() == [0.0, 3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    ("argument", "name"),
    [("mean", "running_mean"), ("var", "running_var"), ("gamma", "weight"), ("beta", "bias")],
)
def test_case_35_nan_and_inf_are_refused_by_channel(argument: str, name: str, bad: float) -> None:
    given = statistics()
    given[argument][4] = bad
    # Worse ones in a later channel: the first channel is named, whichever statistic it is in.
    given["mean"][5] = given["beta"][5] = math.nan
    with pytest.raises(NotFoldable, match=f"{name} of channel 4 is {bad}") as refusal:
        batch_norm(given["mean"], given["var"], 1e-5, given["gamma"], given["beta"])
    assert refusal.value.code == "bad-statistics"
    assert refusal.value.remedy


@pytest.mark.parametrize(("var", "eps"), [(-0.5, 1e-5), (-0.5, 1.0), (-5e-324, 1e-5), (0.0, 0.0)])
def test_case_35_a_variance_with_no_root_is_refused_by_channel(var: float, eps: float) -> None:
    values = torch.ones(CHANNELS, dtype=torch.float64)
    values[3] = var
    with pytest.raises(NotFoldable, match=f"running_var of channel 3 is {var}") as refusal:
        batch_norm(torch.zeros(CHANNELS), values, eps)
    assert refusal.value.code == "bad-statistics"


@pytest.mark.parametrize("eps", [math.nan, math.inf, -1e-5])
def test_an_eps_that_no_norm_has_is_refused(eps: float) -> None:
    with pytest.raises(NotFoldable, match="eps") as refusal:
        batch_norm(torch.zeros(2), torch.ones(2), eps)
    assert refusal.value.code == "bad-statistics"


def test_a_scale_beyond_float64_is_refused() -> None:
    huge = torch.tensor([1.0, 1e308], dtype=torch.float64)
    with pytest.raises(NotFoldable, match="scale of channel 1 is inf"):
        batch_norm(torch.zeros(2), torch.full((2,), 1e-9), 0.0, huge)


def test_sizes_that_differ_are_refused() -> None:
    for gamma, beta in [(torch.ones(3), None), (None, torch.ones(3)), (torch.ones(1), None)]:
        with pytest.raises(NotFoldable) as refusal:
            batch_norm(torch.zeros(2), torch.ones(2), 1e-5, gamma, beta)
        assert refusal.value.code == "shape"


def test_illegal_values_cannot_be_constructed() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        ChannelAffine(ones.float(), ones)
    for scale, shift in [(ones, ones[:1]), (ones[None], ones[None])]:
        with pytest.raises(NotFoldable) as refusal:
            ChannelAffine(scale, shift)
        assert refusal.value.code == "shape"
    with pytest.raises(NotFoldable, match="shift of channel 1 is nan"):
        ChannelAffine(ones, torch.tensor([0.0, math.nan], dtype=torch.float64))


def test_a_value_carries_no_autograd_history() -> None:
    f = batch_norm(torch.zeros(2), torch.ones(2), 1e-5, nn.Parameter(torch.ones(2)))
    assert not f.scale.requires_grad
    assert not f.shift.requires_grad


def test_an_input_of_other_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="has 1 channels"):
        affine(CHANNELS)(random(2, 1, 3))


def test_on_meta_only_shapes_are_checked() -> None:
    meta = torch.empty(4, device="meta")
    f = batch_norm(meta, meta, 1e-5, meta, meta)
    assert f.channels == 4
    assert f(torch.empty(2, 4, 3, device="meta")).shape == (2, 4, 3)
    with pytest.raises(NotFoldable):
        batch_norm(meta, meta[:2], 1e-5)
