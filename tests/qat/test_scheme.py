from __future__ import annotations

import dataclasses

import pytest
import torch

from fusecli.qat import (
    DEFAULT,
    FBGEMM,
    INT8_PER_CHANNEL,
    INT8_PER_TENSOR,
    QNNPACK,
    UINT7,
    UINT8,
    MovingAverageMinMaxObserver,
    Scheme,
    TensorScheme,
)
from tests.qat.oracle import torch_ao


@pytest.mark.parametrize(
    ("integers", "options", "message"),
    [
        ((0, 256), {}, "does not fit into 8 bits"),
        ((-200, 100), {}, "8 bits"),
        ((0, 255), {"symmetric": True}, "negative integers"),
        ((3, 9), {}, "0 has to be one of the integers"),
        ((0, 255), {"averaging_constant": 0}, "averaging constant"),
    ],
)
def test_a_scheme_that_is_none_cannot_be_written(
    integers: tuple[int, int], options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TensorScheme(*integers, **options)  # type: ignore[arg-type]


def test_activations_have_one_scale() -> None:
    with pytest.raises(ValueError, match="one scale for the tensor"):
        Scheme(activation=INT8_PER_CHANNEL)


def test_schemes_are_values() -> None:
    assert Scheme(INT8_PER_CHANNEL, UINT8) == DEFAULT
    with pytest.raises(dataclasses.FrozenInstanceError):
        UINT8.quant_max = 127  # type: ignore[misc]


@pytest.mark.parametrize(("scheme", "backend"), [(FBGEMM, "fbgemm"), (QNNPACK, "qnnpack")])
def test_the_named_ones_mean_what_torch_ao_means(scheme: Scheme, backend: str) -> None:
    with torch_ao() as ao:
        qconfig = ao.get_default_qat_qconfig(backend, version=0)
        theirs = (qconfig.weight(), qconfig.activation())
    for ours, reference in zip((scheme.weight, scheme.activation), theirs, strict=True):
        observer = reference.activation_post_process
        assert (ours.quant_min, ours.quant_max) == (observer.quant_min, observer.quant_max)
        assert ours.symmetric == ("symmetric" in str(observer.qscheme))
        assert ours.per_channel == reference.is_per_channel
        assert ours.averaging_constant == observer.averaging_constant


def test_the_range_of_a_weight_has_no_memory_and_that_of_an_activation_has() -> None:
    for scheme, remembers in (
        (INT8_PER_CHANNEL, False),
        (INT8_PER_TENSOR, False),
        (UINT8, True),
        (UINT7, True),
    ):
        fake = scheme.fake_quantize()
        assert isinstance(fake.activation_post_process, MovingAverageMinMaxObserver)
        fake(torch.tensor([[-1.0, 1.0]]))
        before = fake.scale.clone()
        fake(torch.tensor([[-2.0, 2.0]]))
        assert (fake.scale < 1.5 * before) == remembers
