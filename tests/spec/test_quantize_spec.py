"""The quantize section of a spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusecli.errors import UsageError
from fusecli.spec import Spec, read_spec
from fusecli.spec.load import spec_from_mapping
from fusecli.spec.typed import Typed, spec_from_options


def read(**quantize: Any) -> Spec:
    return spec_from_mapping({"version": 1, "quantize": quantize})


def test_nothing_is_asked_by_default() -> None:
    found = spec_from_mapping({"version": 1}).quantize
    assert (found.observer, found.weights, found.batch) == ("minmax", "per-channel", 32)
    assert (found.equalize, found.correct_bias, found.calibrate) == (False, False, ())
    assert not found.threshold.asks


@pytest.mark.parametrize(
    "line", [{"sqnr": 20}, {"cosine": 0.98}, {"cosine": 1}, {"top1": 1.0}, {"accuracy_drop": 0}]
)
def test_a_threshold_that_asks(line: dict[str, float]) -> None:
    assert read(threshold=line).quantize.threshold.asks


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"threshold": {"cosine": -1}}, "a threshold that everything passes proves nothing"),
        ({"threshold": {"top1": 0}}, "a threshold that everything passes proves nothing"),
        ({"threshold": {"accuracy_drop": 100}}, "a threshold that everything passes proves nothing"),
        ({"threshold": {"sqnr": 0}}, "sqnr is above 0, found 0; an output of zeros has 0 dB"),
        ({"threshold": {"sqnr": -40.5}}, "sqnr is above 0, found -40.5"),
        ({"threshold": {"cosine": 1.01}}, "cosine is between -1 and 1, found 1.01"),
        ({"threshold": {"top1": 99}}, "top1 is between 0 and 1, found 99"),
        ({"threshold": {"accuracy_drop": -1}}, "accuracy_drop is between 0 and 100, found -1"),
        ({"threshold": {"cosine": "high"}}, "a number is expected"),
        ({"threshold": 0.9}, "a mapping is expected"),
        ({"observer": "histogramm"}, "histogram"),
        ({"weights": "per_channel"}, "per-channel"),
        ({"batch": 0}, "this is at least 1"),
        ({"equalize": "maybe"}, "equalize"),
        ({"calibrate": [{"file": "x.safetensors"}]}, "key is missing"),
        (
            {"calibrate": [{"shape": [2], "name": "x"}, {"shape": [2]}]},
            "a positional input stands after a named one",
        ),
    ],
)
def test_what_is_wrong_is_said(quantize: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        read(**quantize)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("quantize", "key", "near"),
    [
        ({"observr": "minmax"}, "observr", "observer"),
        ({"threshold": {"cosin": 0.9}}, "cosin", "cosine"),
        ({"calibrate": [{"fil": "x.safetensors", "key": "x"}]}, "fil", "file"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(quantize: dict[str, Any], key: str, near: str) -> None:
    with pytest.raises(UsageError) as raised:
        read(**quantize)
    assert f"key '{key}' is unknown; did you mean '{near}'?" in str(raised.value)


def test_a_line_and_a_column(tmp_path: Path) -> None:
    path = tmp_path / "quantize.yaml"
    path.write_text("version: 1\nquantize:\n  threshold:\n    sqnr: -3\n")
    with pytest.raises(UsageError, match=r"quantize\.yaml:3:3: sqnr is above 0"):
        read_spec(path)


def test_what_is_typed_replaces_its_own_key_only(tmp_path: Path) -> None:
    path = tmp_path / "quantize.yaml"
    text = "quantize: {weights: per-tensor, threshold: {sqnr: 20, cosine: 0.9}, batch: 4, equalize: true}\n"
    path.write_text(f"version: 1\n{text}")
    typed = {"observer": "histogram", "threshold": {"cosine": 0.5}}
    found = spec_from_options(path, Typed(quantize=typed)).quantize
    assert (found.observer, found.weights, found.batch, found.equalize) == (
        "histogram",
        "per-tensor",
        4,
        True,
    )
    assert (found.threshold.sqnr, found.threshold.cosine) == (None, 0.5)
