"""The report for programs: strict JSON, the same bytes for the same outcome."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from fusecli.contents import Contents
from fusecli.outcome import SCHEMA_VERSION, GroupReport, Outcome, Verdict
from fusecli.report import facts
from fusecli.report.wording import next_step


def as_json(outcome: Outcome) -> str:
    """The whole outcome; keys of records in the order of outcome.py, keys of mappings sorted.

    A number that is not finite is null, and the notes of its group (or the reasons of the verdict) say so.
    """
    report = {
        "schema_version": SCHEMA_VERSION,
        "command": outcome.command,
        "status": outcome.status,
        "exit_code": int(outcome.exit_code),
        "input": _plain(outcome.input),
        "output": _plain(outcome.output),
        "spec": _plain(outcome.spec),
        "totals": {"before": _plain(outcome.totals_before), "after": _plain(outcome.totals_after)},
        "groups": [_group(group) for group in facts.all_groups(outcome)],
        "refused": _plain(outcome.refused),
        "unfused": _plain(outcome.unfused),
        "verification": _verification(outcome.verification),
        "ledger": _plain(outcome.ledger),
        "environment": _plain(outcome.environment),
        "recording": outcome.recording,
        "peak_memory": outcome.peak_memory,
        "quantization": _plain(outcome.quantization),
        "problems": _plain(outcome.problems),
        "next_step": next_step(outcome),
    }
    return _text(report)


def contents_as_json(contents: Contents) -> str:
    """All that `inspect` found, under the same first keys as every report."""
    head = {"schema_version": SCHEMA_VERSION, "command": "inspect", "status": "inspected", "exit_code": 0}
    return _text(head | _plain(contents))


def _text(report: dict[str, Any]) -> str:
    return _harmless(json.dumps(report, indent=2, allow_nan=False)) + "\n"


def _harmless(text: str) -> str:
    """The same JSON, but safe to print: DEL is a control character, and `##[` a command to CI runners.

    Both can occur inside strings only, where \\u escapes mean the same.
    """
    return text.replace("\x7f", "\\u007f").replace("##", "#\\u0023")


def _group(group: GroupReport) -> dict[str, Any]:
    record: dict[str, Any] = _plain(group)
    record["notes"] = [*group.notes, *facts.unreal(group)]
    return record


def _verification(verdict: Verdict | None) -> dict[str, Any] | None:
    if verdict is None:
        return None
    record: dict[str, Any] = _plain(verdict)
    # They stand at the top level already: the same fact twice could only disagree.
    del record["groups"], record["ledger"]
    measured = {name: getattr(verdict, name) for name in ("float64_error", "drift", "noise_floor")}
    record["reasons"] = [*verdict.reasons, *facts.unreal_numbers(measured)]
    return record


def _plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
