"""What int8 lost, in every rendering: the same numbers, and no line that is too long."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from fusecli.errors import ExitCode
from fusecli.outcome import ChannelReport, EqualizedReport, FloatReport, Outcome, Quantization, UnitReport
from fusecli.report import as_json, as_markdown, print_terminal
from fusecli.report.int8 import cosine, decibels, hazard, left_kinds, percent, thresholds
from tests.report.outcomes import FUSED

UNITS = (
    UnitReport("up.conv", "conv_transpose2d", ("up.conv",), 3.14, -0.25, 512.0),
    UnitReport("stem.conv", "conv2d+relu", ("stem.conv",), 40.96, 0.999999, 99.0),
    UnitReport("same", "max_pool2d", ("same",), math.inf, 1.0, None),
)
FOUND = Quantization(
    units=UNITS,
    left=(
        *(FloatReport(f"act{n}", "gelu", "there is no integer form of gelu here") for n in range(5)),
        FloatReport("view", "view", "it only passes values on, and its input is not quantized"),
    ),
    options={"observer": "minmax", "weights": "per-channel"},
    calibration="128 samples of calibration.safetensors:images",
    samples=4,
    sqnr=36.68,
    cosine=0.99989,
    worst_cosine=0.999378,
    top1=0.995,
    channel_sqnr=ChannelReport(4.25, "channel 6 of 8"),
    channel_cosine=ChannelReport(0.51239, "channel 7 of 8"),
    constant=("channel 6 of 8",),
    accuracy={"float": 0.992, "fused": 0.992, "int8": 0.983},
    bytes={"float": 96_792, "fused": 94_440, "int8": 33_519},
    latency={"float": 2e-3, "fused": 1e-3, "int8": 3e-3},
    asked={"cosine": 0.98, "sqnr": 20.0, "accuracy_drop": 1.0},
    notes=("the learned scale of up.act.output is not used: it is no quantized value",),
)
WRITTEN = replace(FUSED, command="quantize", status="quantized", quantization=FOUND)
EQUAL = replace(FOUND, equalized=(EqualizedReport("conv2d", "linear", 900.0, 1.9, 1e3, 1.8),), exact=0.0)
HOSTILE = "\x1b[31m" + "very_long_name." * 12 + "\u202e\n|"


def terminal(outcome: Outcome, width: int = 80) -> str:
    held = io.StringIO()
    print_terminal(outcome, Console(file=held, width=width))
    return held.getvalue()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (decibels(3.14), "3.1 dB"),
        (cosine(0.999999), "0.99999"),
        (cosine(1.0), "1.00000"),
        (cosine(-0.25), "-0.25000"),
        (percent(0.9915), "99.2 %"),
        (hazard(UNITS[0]), "weight range 512×"),
        (hazard(UNITS[1]), ""),
        (hazard(UNITS[2]), ""),
        (thresholds(FOUND), "cosine at least 0.98, sqnr at least 20 dB, accuracy_drop at most 1 points"),
    ],
)
def test_numbers(text: str, wanted: str) -> None:
    assert text == wanted


def test_what_stays_float_for_one_reason_is_said_once() -> None:
    kinds = left_kinds(FOUND.left)
    assert [len(places) for places in kinds.values()] == [5, 1]
    assert "gelu: act0, act1, act2 and 2 more" in terminal(WRITTEN)


@pytest.mark.parametrize("rendered", [terminal(WRITTEN), as_markdown(WRITTEN)], ids=["terminal", "markdown"])
def test_every_rendering_has_the_numbers(rendered: str) -> None:
    text = " ".join(rendered.split())
    for fact in ("up.conv", "3.1 dB", "-0.25000", "weight range 512×", "36.7 dB", "0.99937", "99.5 %"):
        assert fact in text, fact
    for fact in ("channel 6 of 8 4.2 dB", "channel 7 of 8 0.51239", "one number in int8, not in float"):
        assert fact in text, fact
    for fact in ("98.3 %", "33.5 kB", "1.50×", "gelu", "calibration.safetensors:images", "at least 20 dB"):
        assert fact in text, fact


def test_json_has_the_same_and_is_strict() -> None:
    found = json.loads(as_json(WRITTEN))["quantization"]
    assert [unit["name"] for unit in found["units"]] == ["up.conv", "stem.conv", "same"]
    assert found["units"][2]["sqnr"] is None  # infinite
    assert found["channel_sqnr"] == {"value": 4.25, "place": "channel 6 of 8"}
    assert found["constant"] == ["channel 6 of 8"]
    assert (found["accuracy"]["int8"], found["asked"]["sqnr"], found["exact"]) == (0.983, 20.0, None)


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("name", ["up.conv", HOSTILE], ids=["plain", "hostile"])
def test_lines_fit(width: int, name: str) -> None:
    units = (replace(UNITS[0], name=name), *UNITS[1:])
    left = (FloatReport(name, "gelu", "there is no integer form of gelu here"),)
    text = terminal(replace(WRITTEN, quantization=replace(EQUAL, units=units, left=left)), width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_no_label_is_cut_short() -> None:
    assert "…" not in terminal(WRITTEN)


def test_the_worst_are_shown_and_the_rest_counted() -> None:
    many = replace(FOUND, units=tuple(replace(UNITS[0], name=f"conv{n}") for n in range(20)))
    text = terminal(replace(WRITTEN, quantization=many))
    assert ("conv11 " in text, "conv12 " in text) == (True, False)
    assert "8 more; --report json=PATH has all" in text


def test_what_was_moved_between_layers() -> None:
    assert "1 pair of layers, float64 error 0.0e+00" in terminal(replace(WRITTEN, quantization=EQUAL))


def test_a_plan_has_no_numbers_yet() -> None:
    bare = tuple(replace(unit, sqnr=None, cosine=None) for unit in UNITS)
    planned = Quantization(units=bare, left=FOUND.left, options=FOUND.options)
    outcome = replace(WRITTEN, status="planned", output=None, quantization=planned, exit_code=ExitCode.OK)
    text = terminal(outcome)
    assert "in the order of the run" in text
    assert "dB" not in text
    assert "accuracy" not in as_markdown(outcome)
