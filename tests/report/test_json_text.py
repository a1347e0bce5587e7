from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from fusecli.report import as_json
from tests.report.outcomes import DIFFERENT, FUSED, HOSTILE, SAMPLES

KEYS = [
    *("schema_version", "command", "status", "exit_code", "input", "output", "spec", "totals", "groups"),
    *("refused", "unfused", "verification", "ledger", "environment", "recording"),
    *("peak_memory", "quantization", "problems", "next_step"),
]
GROUP_KEYS = {"modules", "rule", "status", "evidence", "float64_error", "drift", "noise_floor"}


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", SAMPLES)
def test_top_level_keys_are_exactly_the_contract(name: str) -> None:
    assert list(_strict(as_json(SAMPLES[name]))) == KEYS


def test_groups_carry_the_contract_and_the_rest_of_their_report() -> None:
    group = _strict(as_json(FUSED))["groups"][0]
    assert group.keys() >= GROUP_KEYS
    assert group["modules"] == ["conv1", "bn1", "relu1"]
    assert group["keys_renamed"][0] == ["conv1.weight", "conv1.0.weight"]
    assert group["evidence"] == "observed"


def test_groups_are_said_once() -> None:
    verification = _strict(as_json(FUSED))["verification"]
    assert "groups" not in verification
    assert verification["judgement"] == "equivalent"


def test_groups_that_only_the_verdict_holds_are_reported() -> None:
    assert _strict(as_json(replace(FUSED, groups=())))["groups"] == _strict(as_json(FUSED))["groups"]


def test_a_number_that_is_not_finite_is_null_and_said_in_words() -> None:
    assert FUSED.verification is not None
    group = replace(FUSED.groups[0], drift=float("nan"), noise_floor=float("inf"))
    verdict = replace(FUSED.verification, float64_error=float("inf"))
    report = _strict(as_json(replace(FUSED, groups=(group,), verification=verdict)))
    assert report["groups"][0]["drift"] is None
    assert "drift is not a finite number: nan" in report["groups"][0]["notes"]
    assert "noise_floor is not a finite number: inf" in report["groups"][0]["notes"]
    assert "float64_error is not a finite number: inf" in report["verification"]["reasons"]


def test_names_come_back_as_they_were_and_the_text_is_plain_ascii() -> None:
    text = as_json(HOSTILE)
    assert [group["modules"][0] for group in _strict(text)["groups"]] == [
        g.modules[0] for g in HOSTILE.groups
    ]
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    assert "##" not in text
    assert not any(line.lstrip().startswith("::") for line in text.splitlines())


def test_the_same_outcome_gives_the_same_bytes_whatever_the_order_of_its_mappings() -> None:
    turned = replace(FUSED, environment=dict(reversed(FUSED.environment.items())))
    assert as_json(turned) == as_json(FUSED)
    assert as_json(FUSED).endswith("}\n")


def test_the_model_is_never_rendered() -> None:
    assert as_json(replace(FUSED, model=object())) == as_json(FUSED)


def test_failure_carries_its_evidence() -> None:
    report = _strict(as_json(DIFFERENT))
    assert report["exit_code"] == 1
    assert report["verification"]["first_different"] == list(DIFFERENT.groups[20].modules)
    assert report["verification"]["smallest_tolerance"] == 4.1e-5
    assert report["next_step"]


def test_an_empty_outcome_is_still_a_report() -> None:
    outcome = SAMPLES["error"]
    report = _strict(as_json(outcome))
    assert report["totals"] == {"before": None, "after": None}
    assert report["problems"] == list(outcome.problems)
