"""Three renderings, one report: a fact that one of them tells, the others tell too."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from fusecli.outcome import FileFacts, Outcome
from fusecli.report import as_json, as_markdown, print_terminal
from fusecli.report.figures import whole
from tests.report.outcomes import SAMPLES

PLAIN = {name: outcome for name, outcome in SAMPLES.items() if name != "hostile"}


def _terminal(outcome: Outcome) -> str:
    file = io.StringIO()
    print_terminal(outcome, Console(file=file, width=100))
    return re.sub(r"\s+", " ", file.getvalue())


@pytest.mark.parametrize("name", PLAIN)
def test_verdict_and_exit_code(name: str) -> None:
    outcome = PLAIN[name]
    told = _terminal(outcome)
    assert outcome.status in as_json(outcome)
    assert outcome.status in as_markdown(outcome).splitlines()[0] + told
    assert outcome.status in told
    code = int(outcome.exit_code)
    assert f'"exit_code": {code},' in as_json(outcome)
    assert f"exit {code}" in as_markdown(outcome)
    assert f"exit {code}" in told


@pytest.mark.parametrize("name", PLAIN)
def test_totals(name: str) -> None:
    outcome = PLAIN[name]
    for totals in (outcome.totals_before, outcome.totals_after):
        for count in (totals.modules, totals.parameters, totals.bytes, totals.norms) if totals else ():
            assert whole(count) in _terminal(outcome)
            assert whole(count) in as_markdown(outcome)
            assert ("null" if count is None else str(count)) in as_json(outcome)


@pytest.mark.parametrize("name", PLAIN)
def test_hashes_of_every_file(name: str) -> None:
    outcome = PLAIN[name]
    files: list[FileFacts | None] = [outcome.input, outcome.spec, outcome.output]
    for digest in (file.sha256 for file in files if file and file.sha256):
        assert digest in as_json(outcome)
        assert digest in as_markdown(outcome)
        assert digest in _terminal(outcome)


@pytest.mark.parametrize("name", PLAIN)
def test_groups_refusals_norms_and_ledger(name: str) -> None:
    outcome = PLAIN[name]
    modules = [m for group in outcome.groups for m in group.modules]
    modules += [m for refusal in outcome.refused for m in refusal.group]
    modules += [norm.module for norm in outcome.unfused]
    modules += [entry.where for entry in outcome.ledger]
    for module in modules:
        assert f'"{module}"' in as_json(outcome)
        assert f"`{module}`" in as_markdown(outcome)


@pytest.mark.parametrize("name", PLAIN)
def test_reasons_problems_and_checks(name: str) -> None:
    outcome = PLAIN[name]
    said = [*outcome.problems, *(refusal.reason for refusal in outcome.refused)]
    if outcome.verification:
        said += [*outcome.verification.reasons, *outcome.verification.checks.values()]
    for sentence in said:
        assert sentence in as_json(outcome)
        assert sentence in as_markdown(outcome).replace("`", "")
        assert sentence in _terminal(outcome)
