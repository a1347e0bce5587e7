from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusecli.qat import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from tests.qat.oracle import torch_ao

KINDS = [
    MinMaxObserver,
    PerChannelMinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
]
INTEGERS = [(0, 255, False), (0, 127, False), (-128, 127, False), (-128, 127, True), (-127, 127, True)]
DATA = {
    "mixed": lambda x: x,
    "positive": lambda x: x.abs() + 0.5,
    "negative": lambda x: -x.abs() - 0.5,
    "zeros": torch.zeros_like,
    "tiny": lambda x: x * 1e-9,
    "one side per channel": lambda x: x.abs() * torch.tensor([1.0, -1, 0, 1e-9])[:, None, None],
}


def theirs(kind: type[MinMaxObserver], low: int, high: int, symmetric: bool) -> Any:
    with torch_ao() as ao:
        shape = "per_channel" if "PerChannel" in kind.__name__ else "per_tensor"
        return getattr(ao, kind.__name__)(
            dtype=torch.qint8 if low else torch.quint8,
            qscheme=getattr(torch, f"{shape}_{'symmetric' if symmetric else 'affine'}"),
            quant_min=low,
            quant_max=high,
        )


def batches(name: str, count: int = 5) -> list[Tensor]:
    torch.manual_seed(0)
    return [DATA[name](torch.randn(4, 3, 5) * (1 + n)) for n in range(count)]


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("integers", INTEGERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_is_that_of_torch_ao(
    kind: type[MinMaxObserver], integers: tuple[int, int, bool], data: str
) -> None:
    low, high, symmetric = integers
    ours, reference = kind(low, high, symmetric=symmetric), theirs(kind, *integers)
    for x in batches(data):
        assert ours(x) is x
        reference(x)
        scale, zero_point = ours.calculate_qparams()
        expected_scale, expected_zero = reference.calculate_qparams()
        assert torch.equal(scale, expected_scale)
        assert scale.dtype == expected_scale.dtype
        assert torch.equal(zero_point, expected_zero.to(torch.int32))
        assert zero_point.dtype == torch.int32
        assert torch.equal(ours.min_val, reference.min_val)
        assert torch.equal(ours.max_val, reference.max_val)


def test_channels_are_counted_along_the_axis() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    observer = PerChannelMinMaxObserver(ch_axis=1)
    observer(x)
    assert observer.min_val.tolist() == [0, 4, 8]
    assert observer.max_val.tolist() == [15, 19, 23]


def test_a_vector_has_one_number_for_each_channel() -> None:
    observer = PerChannelMinMaxObserver()
    observer(torch.tensor([1.0, -2.0]))
    assert observer.max_val.tolist() == [1, -2]


def test_the_constant_is_how_much_the_new_one_counts() -> None:
    slow, none = (
        MovingAverageMinMaxObserver(averaging_constant=0.25),
        MovingAverageMinMaxObserver(averaging_constant=1),
    )
    for x in (torch.tensor([-1.0, 1.0]), torch.tensor([-5.0, 3.0])):
        slow(x)
        none(x)
    assert (slow.min_val.item(), slow.max_val.item()) == (-2, 1.5)
    assert (none.min_val.item(), none.max_val.item()) == (-5, 3)


def test_no_memory_is_no_trace_of_what_was_seen_before() -> None:
    observer = MovingAverageMinMaxObserver(averaging_constant=1)
    for x in (torch.tensor([-1e9, 1e9]), torch.tensor([-1.0, 1.0])):  # 1e9 + (1 - 1e9) is 0 in float32
        observer(x)
    assert (observer.min_val.item(), observer.max_val.item()) == (-1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_both_ways_before_and_after_learning(kind: type[MinMaxObserver]) -> None:
    for seen in (0, 2):
        ours, reference = kind(), theirs(kind, 0, 255, False)
        for x in batches("mixed", seen):
            ours(x)
            reference(x)
        saved, expected = ours.state_dict(), reference.state_dict()
        assert [(k, v.shape, v.dtype) for k, v in saved.items()] == [
            (k, v.shape, v.dtype) for k, v in expected.items()
        ]
        fresh, theirs_fresh = kind(), theirs(kind, 0, 255, False)
        fresh.load_state_dict(expected, strict=True)
        theirs_fresh.load_state_dict(saved, strict=True)
        for key, value in expected.items():
            assert torch.equal(fresh.state_dict()[key], value)
            assert torch.equal(theirs_fresh.state_dict()[key], value)
        # Without metadata, as from a file of tensors only.
        kind().load_state_dict({**expected}, strict=True)


def test_a_range_of_one_tensor_is_not_loaded_as_one_of_channels() -> None:
    one, many = MinMaxObserver(), PerChannelMinMaxObserver()
    one(torch.randn(4, 3))
    many(torch.randn(4, 3))
    for target, source in ((PerChannelMinMaxObserver(), one), (MinMaxObserver(), many)):
        with pytest.raises(RuntimeError, match="size mismatch for min_val"):
            target.load_state_dict(source.state_dict())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_an_error_and_not_learned(kind: type[MinMaxObserver], bad: float) -> None:
    # 3e38 and -3e38 are finite, the range between them is not.
    observer, x = kind(), torch.randn(4, 3)
    broken = x.clone()
    broken[1, 1:] = torch.tensor([bad, -bad])
    with pytest.raises(ValueError, match=r"shape \[4, 3\] has NaN or infinite values"):
        observer(broken)
    assert not observer.observed
    observer(x)
    before = copy.deepcopy(observer.state_dict())
    with pytest.raises(ValueError, match="disable_observer"):
        observer(broken if bad != 3e38 else broken.double() * 1e10)
    assert all(torch.equal(value, before[key]) for key, value in observer.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_seen_has_no_scale(kind: type[MinMaxObserver]) -> None:
    observer = kind()
    observer(torch.empty(0, 3))
    with pytest.raises(ValueError, match="nothing has been observed"):
        observer.calculate_qparams()


def test_the_nan_that_torch_ao_learned_is_forgotten() -> None:
    reference = theirs(MovingAverageMinMaxObserver, 0, 255, False)
    for x in (torch.randn(3), torch.tensor([float("nan"), 1.0])):
        reference(x)
    observer = MovingAverageMinMaxObserver()
    observer.load_state_dict(reference.state_dict())
    assert not observer.observed
    observer(torch.tensor([-1.0, 1.0]))
    assert (observer.min_val.item(), observer.max_val.item()) == (-1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_another_dtype_is_observed_in_float32(
    kind: type[MinMaxObserver], dtype: torch.dtype
) -> None:
    model = nn.ModuleList([kind()]).to(dtype)
    observer, x = model[0], torch.randn(4, 3).to(dtype)
    observer(x)
    assert {tensor.dtype for tensor in observer.state_dict().values()} == {torch.float32}
    low = x.float().amin(1) if "PerChannel" in kind.__name__ else x.float().min()
    assert torch.equal(observer.min_val, low)
    assert torch.equal(model.to(torch.bfloat16)[0].min_val, low)


def test_a_slow_average_moves_in_a_bfloat16_model() -> None:
    # In bfloat16, 100 + 0.01 (101 - 100) is 100: torch.ao's observer would stand still.
    observer = nn.ModuleList([MovingAverageMinMaxObserver()]).bfloat16()[0]
    for top in [100.0] + [101.0] * 500:
        observer(torch.tensor([0.0, top], dtype=torch.bfloat16))
    assert observer.max_val > 100.9


def test_observers_go_to_the_device_of_the_model() -> None:
    assert nn.ModuleList([MinMaxObserver()]).to("meta")[0].min_val.is_meta


@pytest.mark.parametrize("kind", KINDS)
def test_observers_are_copied_and_pickled(kind: type[MinMaxObserver]) -> None:
    observer = kind(-128, 127, symmetric=True)
    observer(torch.randn(4, 3))
    for twin in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))):
        assert torch.equal(twin.calculate_qparams()[0], observer.calculate_qparams()[0])
        twin(torch.randn(4, 3) * 9)
        assert not torch.equal(twin.calculate_qparams()[0], observer.calculate_qparams()[0])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 255), {}, "0 has to be one of the integers, not 1..255"),
        ((-5, -1), {}, "not -5..-1"),
        ((0, 0), {}, "not 0..0"),
        ((0, 255), {"symmetric": True}, "needs negative integers, not 0..255"),
        ((0, 255), {"averaging_constant": 0}, "averaging constant"),
        ((0, 255), {"averaging_constant": 1.5}, "averaging constant"),
    ],
)
def test_an_observer_of_nothing_sensible_cannot_be_built(
    arguments: tuple[int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MovingAverageMinMaxObserver(*arguments, **options)
