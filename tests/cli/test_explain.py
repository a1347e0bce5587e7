"""`fusecli explain`: every code that a report can show has a page."""

from __future__ import annotations

import re

import pytest
import torch

from fusecli.reasons import FAMILIES, REASONS


def said(text: str) -> str:
    return " ".join(text.split())


def test_the_list_has_every_code_with_its_meaning_under_its_family(cli):
    ended = cli("explain")
    assert (ended.code, ended.err) == (0, "")
    listed = re.findall(r"^(\S+) {2,}\S", ended.out, re.MULTILINE)
    assert [word for word in listed if word in REASONS] == list(REASONS)
    heads = [
        line.split("  ")[0] for line in ended.out.splitlines() if line.rstrip().endswith("what was seen")
    ]
    assert heads == list(FAMILIES)
    told = said(ended.out)
    assert all(f"{code} {reason.meaning}" in told for code, reason in REASONS.items())
    assert told.endswith("'fusecli explain CODE' says why, and what to do.")


@pytest.mark.parametrize("code", REASONS)
def test_one_code_has_a_page(cli, code):
    ended = cli("explain", code)
    reason = REASONS[code]
    assert (ended.code, ended.err) == (0, "")
    assert said(ended.out) == f"{code} {reason.meaning} Why {reason.why} Remedy {reason.remedy}"


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("not-adjacnt", "did you mean 'not-adjacent'?"),
        ("tied_weights", "did you mean 'tied-weights'?"),
        ("zzz", "'fusecli explain' lists all"),
    ],
)
def test_an_unknown_code_is_a_usage_error(cli, word, fix):
    ended = cli("explain", word)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"error: reason code '{word}' is unknown\n  fix: {fix}\n"


def test_the_code_of_a_refusal_can_be_looked_up(cli, project):
    folder = project(model=None, inputs=None, assume={"eps": 1e-5})
    state = torch.load(folder / "model.pt", weights_only=True)
    torch.save({**state, "bn.running_var": -state["bn.running_var"]}, folder / "model.pt")
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml")
    assert ended.code == 4
    code = re.search(r"^ +why +([\w-]+)", ended.out, re.MULTILINE)[1]
    assert "'fusecli explain CODE' says more" in ended.out
    assert cli("explain", code).out.startswith("bad-statistics\n")
