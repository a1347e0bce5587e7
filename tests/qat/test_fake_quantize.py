from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from fusecli.qat import (
    INT8_PER_CHANNEL,
    UINT8,
    FakeQuantize,
    MovingAverageMinMaxObserver,
    TensorScheme,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from tests.qat.oracle import torch_ao

SCHEMES = {"tensor": UINT8, "channel": INT8_PER_CHANNEL}


def by_hand(x: Tensor, fake: FakeQuantize) -> tuple[Tensor, Tensor]:
    """The value, and where it was clamped."""
    observer, each = fake.activation_post_process, [-1] + [1] * (x.dim() - 1)
    scale, zero = (t.reshape(each) if t.numel() > 1 else t for t in (fake.scale, fake.zero_point))
    integers = (x * (1 / scale)).round().add(zero)  # as the op does: it matters where it is half way
    kept = integers.clamp(observer.quant_min, observer.quant_max)
    return (kept - zero) * scale, kept != integers


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_it_observes_first_and_rounds_then(scheme: TensorScheme) -> None:
    fake, x = scheme.fake_quantize(), torch.randn(4, 3, 5)
    y = fake(x)
    assert torch.allclose(y, by_hand(x, fake)[0], atol=1e-6)
    assert 0 < (y - x).abs().max() <= fake.scale.max() * 0.5001
    assert torch.equal(fake.activation_post_process.max_val.max(), x.max())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_gradient_goes_through_where_nothing_was_clamped(scheme: TensorScheme) -> None:
    fake = scheme.fake_quantize()
    fake(torch.randn(4, 3, 5))
    fake.apply(disable_observer)
    x = (torch.randn(4, 3, 5) * 3).requires_grad_()
    fake(x).sum().backward()
    _, clamped = by_hand(x.detach(), fake)
    assert clamped.any()
    assert x.grad is not None
    assert torch.equal(x.grad, (~clamped).float())


@pytest.mark.parametrize("kind", ["FakeQuantize", "FusedMovingAvgObsFakeQuantize"])
@pytest.mark.parametrize("name", SCHEMES)
def test_state_dicts_go_both_ways_with_torch_ao(name: str, kind: str) -> None:
    with torch_ao() as ao:
        qconfig = ao.get_default_qat_qconfig("onednn", version=0 if kind == "FakeQuantize" else 1)
        make = qconfig.activation if name == "tensor" else qconfig.weight
    for batches in (0, 2):
        ours, theirs = SCHEMES[name].fake_quantize(), make()
        assert type(theirs).__name__ == kind
        for _ in range(batches):
            x = torch.randn(4, 3)
            ours(x)
            theirs(x)
        saved, expected = ours.state_dict(), theirs.state_dict()
        assert [(k, v.shape) for k, v in saved.items()] == [(k, v.shape) for k, v in expected.items()]
        if kind == "FakeQuantize":
            assert [v.dtype for v in saved.values()] == [v.dtype for v in expected.values()]
        fresh, theirs_fresh = SCHEMES[name].fake_quantize(), make()
        fresh.load_state_dict(expected, strict=True)
        theirs_fresh.load_state_dict(saved, strict=True)
        for loaded, state in ((fresh, expected), (theirs_fresh, saved)):
            assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
        if batches:
            for module in (ours, theirs, fresh, theirs_fresh):
                module.observer_enabled.fill_(0)
            assert torch.equal(fresh(x), theirs(x))
            if kind == "FakeQuantize":  # its sibling has a formula of its own, even with the observer off
                assert torch.equal(theirs_fresh(x), ours(x))


def test_it_can_be_turned_off_and_on_in_parts() -> None:
    model, x = nn.Sequential(UINT8.fake_quantize(), nn.ReLU()), torch.randn(5)
    fake = model[0]
    model.apply(disable_fake_quant)
    assert torch.equal(fake(x), x)
    assert fake.activation_post_process.observed
    assert fake.scale != 1
    model.apply(enable_fake_quant)
    model.apply(disable_observer)
    before = fake.scale.clone()
    assert fake(x * 9).max() <= x.max() + before
    assert torch.equal(fake.scale, before)
    model.apply(enable_observer)
    fake(x * 9)
    assert fake.scale > before
    assert fake.fake_quant_enabled.dtype == fake.observer_enabled.dtype == torch.uint8


def test_there_is_nothing_to_round_to_before_anything_was_seen() -> None:
    fake = UINT8.fake_quantize()
    fake.apply(disable_observer)
    with pytest.raises(ValueError, match="enable_observer"):
        fake(torch.randn(3))
    fake.apply(disable_fake_quant)
    x = torch.randn(3)
    assert fake(x) is x


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_an_empty_batch_is_no_batch(scheme: TensorScheme) -> None:
    fake = scheme.fake_quantize()
    assert fake(torch.empty(0, 3)).shape == (0, 3)
    assert not fake.activation_post_process.observed


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_nan_is_an_error_and_not_a_number_of_the_range(scheme: TensorScheme) -> None:
    fake = scheme.fake_quantize()
    with pytest.raises(ValueError, match="NaN"):
        fake(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_models_of_other_dtypes_are_rounded_in_float32(scheme: TensorScheme, dtype: torch.dtype) -> None:
    fake = nn.Sequential(scheme.fake_quantize()).to(dtype)[0]
    twin = scheme.fake_quantize()
    for each in (fake, twin):
        each(torch.tensor([[-1.0, 1.1], [-2, 2.1], [-3, 3.1], [-4, 4.1]]))
        each.apply(disable_observer)
    x = torch.randn(4, 3).to(dtype).requires_grad_()
    y = fake(x)
    y.sum().backward()
    z = x.detach().float().requires_grad_()
    twin(z).sum().backward()
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == dtype
    assert torch.allclose(y, twin(z).to(dtype), rtol=1e-6)
    assert torch.equal(x.grad.float(), z.grad)  # type: ignore[arg-type]


def test_a_range_per_channel_is_not_loaded_where_there_is_one() -> None:
    many = INT8_PER_CHANNEL.fake_quantize()
    many(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        TensorScheme(-128, 127, symmetric=True).fake_quantize().load_state_dict(many.state_dict())


def test_copies_and_pickles_are_apart() -> None:
    fake, x = FakeQuantize(MovingAverageMinMaxObserver()), torch.randn(9)
    y = fake(x)
    for twin in (copy.deepcopy(fake), pickle.loads(pickle.dumps(fake))):
        twin.apply(disable_observer)
        assert torch.equal(twin(x), y)
    assert fake.observer_enabled == 1
