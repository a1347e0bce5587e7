from __future__ import annotations

from typing import Any

import pytest

from fusecli.algebra import Geometry


def test_linear_has_no_axes() -> None:
    assert Geometry.linear() == Geometry((), (), ())
    assert Geometry.linear().rank == 0


def test_same_puts_the_smaller_half_before() -> None:
    at = Geometry.from_attributes((2, 3, 4), (1, 1, 1), "same", (1, 2, 3))
    assert at.padding == ((0, 1), (2, 2), (4, 5))


def test_valid_is_no_padding() -> None:
    at = Geometry.from_attributes((3,), (2,), "valid", (1,))
    assert at == Geometry((2,), ((0, 0),), (1,))
    assert not at.padded


def test_output_padding_of_a_conv_module_is_no_part_of_it() -> None:
    # nn.Conv2d carries an output_padding of zeros that it never reads.
    at = Geometry.from_attributes((3,), (1,), (1,), (1,), output_padding=(0,))
    assert at == Geometry((1,), ((1, 1),), (1,))


def test_only_a_zero_padded_conv_has_a_zero_border() -> None:
    padded: dict[str, Any] = {"stride": (1,), "padding": ((1, 1),), "dilation": (1,)}
    assert Geometry(**padded).zero_bordered
    assert not Geometry(**padded, padding_mode="reflect").zero_bordered
    assert not Geometry(**padded, transposed=True).zero_bordered
    assert not Geometry((1,), ((0, 0),), (1,)).zero_bordered


@pytest.mark.parametrize(
    "wrong",
    [
        {"stride": (1, 1)},
        {"output_padding": (0, 0)},
        {"stride": (0,)},
        {"dilation": (0,)},
        {"padding": ((-1, 0),)},
        {"padding_mode": "constant"},
        {"output_padding": (1,)},
        {"transposed": True, "padding_mode": "reflect"},
        {"transposed": True, "padding": ((0, 1),)},
    ],
    ids=str,
)
def test_illegal_values_cannot_be_constructed(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"stride": (1,), "padding": ((0, 0),), "dilation": (1,)}
    with pytest.raises(ValueError, match=r"Geometry|padding mode"):
        Geometry(**right | wrong)


def test_an_unknown_padding_word_is_refused() -> None:
    with pytest.raises(ValueError, match="'full'"):
        Geometry.from_attributes((3,), (1,), "full", (1,))
