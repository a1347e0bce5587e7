"""Every prepared layer with rounding turned off: it has to be the float layer, to the last digits."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli.qat
from fusecli.qat import (
    FakeQuantize,
    QatLayer,
    QatLinear,
    disable_fake_quant,
    disable_observer,
    freeze_bn_stats,
    prepare_qat,
    update_bn_stats,
)
from tests.qat.cases import CASES, IDS, NAMES, OPTIONS, WITH_NORM, batch, build, randomized


def pair(name: str, option: str = "plain") -> tuple[nn.Module, QatLayer]:
    """The float layer and the prepared one, which does not round and does not watch."""
    plain = randomized(build(name, **OPTIONS[option])).double().train()
    prepared = prepare_qat(plain)
    assert isinstance(prepared, QatLayer)
    prepared.apply(disable_observer)
    prepared.apply(disable_fake_quant)
    return plain, prepared


def close(ours: Tensor, theirs: Tensor, largest: float = 0) -> bool:
    """Within 1e-12 of the largest number: others may be what is left of it where it cancels."""
    return (ours - theirs).abs().max().item() <= 1e-12 * max(largest, theirs.abs().max().item())


def same_state(ours: nn.Module, theirs: nn.Module) -> bool:
    """The same parameters and statistics, in the same order; the children of containers are numbered."""
    mine = [
        t for name, t in ours.state_dict().items() if "fake_quant" not in name and "post_process" not in name
    ]
    return all(
        close(a.double(), b.double(), 1) for a, b in zip(mine, theirs.state_dict().values(), strict=True)
    )


def step(module: nn.Module, x: Tensor, target: float) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of one step of training."""
    y = module(x)
    module.zero_grad()
    ((y - target) ** 2).sum().backward()
    torch.optim.SGD(module.parameters(), lr=1e-4).step()
    return y, [p.grad for p in module.parameters() if p.grad is not None]


def all_close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    # The gradient of a bias before a norm is exactly 0, and what is computed is what rounding leaves of it.
    largest = max(gradient.abs().max().item() for gradient in theirs)
    return all(close(a, b, largest) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("name", "option"), CASES, ids=IDS)
def test_two_steps_of_training_are_those_of_the_float_layer(name: str, option: str) -> None:
    plain, prepared = pair(name, option)
    for _ in range(2):
        x, target = batch(name), 0.3
        (expected, theirs), (y, ours) = step(plain, x, target), step(prepared, x, target)
        assert close(y, expected)
        assert all_close(ours, theirs)
        assert same_state(prepared, plain)


@pytest.mark.parametrize(("name", "option"), CASES, ids=IDS)
def test_in_eval_mode_it_is_the_float_layer(name: str, option: str) -> None:
    plain, prepared = (module.eval() for module in pair(name, option))
    x = batch(name).requires_grad_()
    assert close(prepared(x), plain(x))
    assert same_state(prepared, plain)


@pytest.mark.parametrize("name", WITH_NORM)
def test_frozen_it_is_the_float_layer_with_its_norm_in_eval_mode(name: str) -> None:
    plain, prepared = pair(name)
    plain[1].eval()  # type: ignore[index]
    prepared.apply(freeze_bn_stats)
    prepared.train()
    assert prepared.training
    assert not prepared.bn.training
    x, target = batch(name), 0.3
    (expected, theirs), (y, ours) = step(plain, x, target), step(prepared, x, target)
    assert close(y, expected)
    assert all_close(ours, theirs)
    assert same_state(prepared, plain)
    prepared.apply(update_bn_stats)
    assert prepared.bn.training
    before = prepared.bn.running_mean.clone()
    prepared(x)
    assert not torch.equal(prepared.bn.running_mean, before)


def test_statistics_that_are_updated_again_in_eval_mode_wait_for_train_mode() -> None:
    _, prepared = pair("ConvBn2d")
    prepared.eval().apply(update_bn_stats)
    assert not prepared.bn.training
    assert prepared.train().bn.training


def test_a_norm_that_was_frozen_by_hand_stays_so_until_train_is_called() -> None:
    plain = build("ConvBn2d")
    plain[1].eval()  # type: ignore[index]
    prepared = prepare_qat(plain)
    assert not prepared.bn.training
    assert prepared.train().bn.training


@pytest.mark.parametrize("name", WITH_NORM)
def test_a_channel_with_gamma_zero_learns(name: str) -> None:
    prepared = prepare_qat(randomized(build(name)))
    x = batch(name, torch.float32)
    y = prepared(x)
    assert torch.isfinite(y).all()
    (y * torch.randn_like(y)).sum().backward()
    for parameter in prepared.parameters():
        assert torch.isfinite(parameter.grad).all()  # type: ignore[arg-type]
    assert prepared.bn.weight[1] == 0
    assert prepared.bn.weight.grad[1] != 0 or "ReLU" in name
    assert torch.isfinite(prepared.bn.running_var).all()


@pytest.mark.parametrize("name", WITH_NORM)
def test_in_eval_mode_it_is_the_folded_layer_with_rounded_weights(name: str) -> None:
    prepared = prepare_qat(randomized(build(name), silent=False).double())
    x = batch(name)
    prepared(x)
    prepared.eval().apply(disable_observer)
    prepared.activation_post_process.apply(disable_fake_quant)
    bn, each = prepared.bn, (-1, *[1] * (prepared.weight.dim() - 1))
    factor = bn.weight / (bn.running_var + bn.eps).sqrt()
    folded = prepared.weight_fake_quant(prepared.weight * factor.reshape(each))
    bias = factor * (prepared.bias - bn.running_mean) + bn.bias
    operation = (
        nn.functional.linear
        if isinstance(prepared, QatLinear)
        else getattr(nn.functional, f"conv{name[-2]}d")
    )
    expected = operation(x, folded, bias)
    assert close(prepared(x), expected.relu() if "ReLU" in name else expected)
    levels = (folded / prepared.weight_fake_quant.scale.reshape(each)).flatten()
    assert (levels - levels.round()).abs().max() < 1e-6
    assert levels.abs().max() >= 127


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_outputs_are_rounded(name: str) -> None:
    prepared = prepare_qat(randomized(build(name)))
    y = prepared(batch(name, torch.float32))
    output = prepared.activation_post_process
    assert len(y.unique()) <= 256
    levels = y / output.scale + output.zero_point
    assert (levels - levels.round()).abs().max() < 1e-3
    assert prepared.weight_fake_quant.scale.shape == (6,)
    if "ReLU" in name:
        assert output.zero_point == 0
        assert (y >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_layer_keeps_its_class_and_its_description(name: str) -> None:
    plain = build(name)
    prepared = prepare_qat(plain)
    layer = plain[0] if isinstance(plain, nn.Sequential) else plain
    assert type(prepared) is getattr(fusecli.qat, f"Qat{name}")
    assert isinstance(prepared, type(layer))
    assert repr(prepared).startswith(f"Qat{name}(\n  {layer.extra_repr()}")


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_state_dicts(name: str) -> None:
    prepared = prepare_qat(randomized(build(name)))
    x = batch(name, torch.float32)
    prepared(x)
    prepared.eval().apply(disable_observer)
    expected = prepared(x)
    fresh = prepare_qat(build(name))
    fresh.load_state_dict(prepared.state_dict(), strict=True)
    fresh.eval()
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)), fresh):
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.weight.zero_()
    assert torch.equal(prepared(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_can_change_its_dtype(name: str, dtype: torch.dtype) -> None:
    prepared = prepare_qat(randomized(build(name)))
    x = batch(name, torch.float32)
    expected = prepared(x)
    prepared.to(dtype)
    y = prepared(x.to(dtype))
    y.sum().backward()
    assert y.dtype == prepared.weight.grad.dtype == dtype
    assert (y.float() - expected).abs().max() < 0.1 * expected.abs().max()
    for part in prepared.modules():
        if isinstance(part, FakeQuantize):
            assert part.scale.dtype == torch.float32


def test_a_norm_of_sequences_behind_a_linear_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \[n, c\], not \[2, 6, 4\]"):
        prepare_qat(build("LinearBn1d"))(torch.randn(2, 6, 4))


def test_a_norm_without_gamma_is_scaled_by_its_deviation() -> None:
    plain = fusecli.nn.ConvBn2d(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)).double()
    prepared: Any = prepare_qat(plain)
    prepared.apply(disable_observer)
    prepared.apply(disable_fake_quant)
    x = batch("ConvBn2d")
    assert close(prepared(x), plain(x))
