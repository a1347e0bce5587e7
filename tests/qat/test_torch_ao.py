"""Side by side with torch.ao's prepared modules: the same names, and nearly the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusecli.qat import FBGEMM, QNNPACK, Scheme, prepare_qat
from tests.qat.cases import NAMES, WITH_NORM, batch, build, randomized
from tests.qat.oracle import prepared_by_torch_ao

SCHEMES: dict[str, Scheme] = {"fbgemm": FBGEMM, "qnnpack": QNNPACK}


def both(name: str, backend: str = "fbgemm", version: int = 0) -> tuple[nn.Module, nn.Module]:
    plain = randomized(build(name), silent=False)
    return prepare_qat(nn.Sequential(plain), SCHEMES[backend]), prepared_by_torch_ao(plain, backend, version)


def layout(module: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(key, value.shape, value.dtype) for key, value in module.state_dict().items()]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("batches", [0, 2])
@pytest.mark.parametrize("backend", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_go_both_ways(name: str, backend: str, batches: int) -> None:
    ours, theirs = both(name, backend)
    for _ in range(batches):
        x = batch(name, torch.float32)
        ours(x)
        theirs(x)
    assert layout(ours) == layout(theirs)
    fresh, theirs_fresh = both(name, backend)
    assert not equal(fresh.state_dict(), theirs.state_dict())
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    theirs_fresh.load_state_dict(ours.state_dict(), strict=True)
    assert equal(fresh.state_dict(), theirs.state_dict())
    assert equal(theirs_fresh.state_dict(), ours.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_of_its_fused_observers_go_both_ways(name: str) -> None:
    ours, theirs = both(name, version=1)
    for model in (ours, theirs):
        model(batch(name, torch.float32))
    assert [entry[:2] for entry in layout(ours)] == [entry[:2] for entry in layout(theirs)]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours, theirs = both(name, version=1)
    theirs(batch(name, torch.float32))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for model in (ours, theirs):
        for key, buffer in model.named_buffers():
            if "observer_enabled" in key:
                buffer.fill_(0)
    x = batch(name, torch.float32)
    step = ours[0].activation_post_process.scale.item()  # type: ignore[index]
    assert within_one_step(ours.eval()(x), theirs.eval()(x), step)


def within_one_step(ours: Tensor, theirs: Tensor, step: float) -> bool:
    """Rounded numbers that were 1e-7 apart can be one step apart, but only a few of them."""
    difference = (ours - theirs).abs()
    return bool(difference.max() <= 1.01 * step and (difference > 0.5 * step).float().mean() < 0.02)


@pytest.mark.parametrize("backend", SCHEMES)
@pytest.mark.parametrize("name", NAMES)
def test_in_training_the_numbers_are_nearly_the_same(name: str, backend: str) -> None:
    # The rounded weights are the same bits; theirs are divided by f after the convolution, ours before: a few
    # float32 roundings, 6e-8 each.
    ours, theirs = both(name, backend)
    for _ in range(3):
        x = batch(name, torch.float32)
        found = []
        for model in (ours, theirs):
            model[0].activation_post_process.fake_quant_enabled.fill_(0)  # type: ignore[index]
            model.zero_grad()
            y = model(x)
            (y**2).mean().backward()
            found.append((y, [p.grad for p in model.parameters()]))
        (y, gradients), (expected, their_gradients) = found
        assert (y - expected).abs().max() <= 3e-6 * expected.abs().max()
        largest = max(g.abs().max() for g in their_gradients)  # type: ignore[union-attr]
        for a, b in zip(gradients, their_gradients, strict=True):
            assert (a - b).abs().max() <= 1e-5 * largest  # type: ignore[operator]
        for model in (ours, theirs):
            torch.optim.SGD(model.parameters(), lr=1e-2).step()
    for key in ("scale", "activation_post_process.min_val"):
        key = f"0.weight_fake_quant.{key}"
        assert torch.allclose(ours.state_dict()[key], theirs.state_dict()[key], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_with_everything_rounded_only_a_few_are_one_step_apart(name: str) -> None:
    ours, theirs = both(name)
    for _ in range(3):
        x = batch(name, torch.float32)
        y, expected = ours(x), theirs(x)
        step = ours[0].activation_post_process.scale.item()  # type: ignore[index]
        assert within_one_step(y, expected, step)
    assert within_one_step(ours.eval()(x), theirs.eval()(x), step)


@pytest.mark.parametrize("name", WITH_NORM)
def test_where_gamma_is_zero_torch_ao_has_no_number(name: str) -> None:
    plain, x = randomized(build(name)), batch(name, torch.float32)
    assert torch.isfinite(prepare_qat(plain)(x)).all()
    theirs = prepared_by_torch_ao(plain)
    theirs[0].activation_post_process.fake_quant_enabled.fill_(0)  # it would hide the NaN
    assert not torch.isfinite(theirs(x)).all()
