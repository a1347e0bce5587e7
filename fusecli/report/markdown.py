"""The report for a CI job summary or a pull request: the verdict first, then everything it rests on."""

from __future__ import annotations

from collections.abc import Callable

from fusecli.outcome import GroupReport, Judgement, Outcome, Refusal
from fusecli.report import facts, int8
from fusecli.report.figures import ABSENT, difference, scientific, size, times, whole
from fusecli.report.markdown_text import code, prose, table
from fusecli.report.wording import MORE, grounds, headline, next_step

_MARKS = {Judgement.EQUIVALENT: "✓ ", Judgement.DIFFERENT: "✗ ", Judgement.INCONCLUSIVE: "? ", None: ""}


def as_markdown(outcome: Outcome) -> str:
    """The whole outcome as GitHub-flavoured Markdown; sections without content are left out."""
    sections: tuple[Callable[[Outcome], list[str]], ...] = (
        _verdict,
        _int8,
        _groups,
        _remarks,
        _refused,
        _unfused,
        _totals,
        _checks,
        _ledger,
        _keys,
        _files,
        _environment,
    )
    return "\n".join(line for section in sections for line in section(outcome))


def _verdict(outcome: Outcome) -> list[str]:
    head = headline(outcome)
    lines = [
        f"## {_MARKS[head.judgement]}{prose(head.title)}",
        "",
        f"{code(outcome.command)}: {head.detail}",
        "",
    ]
    lines += [f"- **{label}** {prose(sentence)}" for label, sentence in grounds(outcome)]
    step = next_step(outcome)
    if step:
        lines.append(f"- **next** {code(step) if step.startswith('fusecli ') else prose(step)}")
    return [*lines, ""]


def _int8(outcome: Outcome) -> list[str]:
    found = outcome.quantization
    if found is None:
        return []
    said = [("calibrated on", found.calibration), *int8.whole_model(found), ("asked", int8.thresholds(found))]
    lines = ["### Int8", "", *(f"- **{what}** {prose(number)}" for what, number in said if number), ""]
    rows = [
        (what, *(values.get(name, ABSENT) for name in ("float", "fused", "int8")))
        for what, values in int8.triples(found)
    ]
    lines += table(("", "float", "fused", "int8"), rows, "lrrr") if rows else []
    units = [
        (
            code(unit.name),
            code(unit.kind),
            int8.decibels(unit.sqnr),
            int8.cosine(unit.cosine),
            int8.hazard(unit) or ABSENT,
        )
        for unit in found.units
    ]
    lines += (
        table(("unit, worst first", "ops", "SQNR", "cosine", "forecast"), units, "llrrl") if units else []
    )
    left = [
        (code(kind), ", ".join(map(code, places)), prose(reason))
        for (kind, reason), places in int8.left_kinds(found.left).items()
    ]
    return lines + (table(("stays float", "where", "why"), left) if left else [])


def _groups(outcome: Outcome) -> list[str]:
    groups = facts.all_groups(outcome)
    if not groups:
        return []
    head = ("modules", "rule", "before → after", "status", "evidence", "float64 error", "drift", "× noise")
    return ["### Groups", "", *table(head, (_group_row(group) for group in groups), "lllllrrr")]


def _group_row(group: GroupReport) -> tuple[str, ...]:
    kinds = " + ".join(map(code, group.kinds_before)) + " → " + " + ".join(map(code, group.kinds_after))
    return (
        " + ".join(map(code, group.modules)),
        code(group.rule),
        kinds if group.kinds_before else ABSENT,
        prose(group.status),
        str(group.evidence),
        scientific(group.float64_error),
        scientific(group.drift),
        times(facts.drift_ratio(group)),
    )


def _remarks(outcome: Outcome) -> list[str]:
    groups = facts.all_groups(outcome)
    lines = [
        f"- int8 hazard: per-channel weight range of {code(' + '.join(group.modules))} is now "
        f"{times(group.weight_range_after)}, was {times(group.weight_range_before)}"
        for group in facts.int8_hazards(groups)
    ]
    for group in groups:
        where = code(group.modules[0]) if group.modules else ABSENT
        lines += [f"- {where}: {code(kept)} stays where it is" for kept in group.kept]
        lines += [f"- {where}: {prose(note)}" for note in (*group.notes, *facts.unreal(group))]
    return ["### Notes", "", *lines, ""] if lines else []


def _refused(outcome: Outcome) -> list[str]:
    lines = [line for refusal in outcome.refused for line in _refusal(refusal)]
    return [*lines, MORE, ""] if lines else []


def _refusal(refusal: Refusal) -> list[str]:
    rule = f" by {code(refusal.rule)}" if refusal.rule else ""
    lines = [f"### Refused: {' + '.join(map(code, refusal.group))}", ""]
    lines.append(f"- **why** {code(refusal.code)}{rule}: {prose(refusal.reason)}")
    lines += [f"- **seen** {prose(seen)}" for seen in refusal.evidence]
    lines += [f"- **remedy** {prose(refusal.remedy)}"] if refusal.remedy else []
    return [*lines, ""]


def _unfused(outcome: Outcome) -> list[str]:
    rows = [
        (code(norm.module), code(norm.kind), code(norm.code), prose(norm.reason)) for norm in outcome.unfused
    ]
    return ["### Norms left", "", *table(("module", "kind", "code", "why"), rows)] if rows else []


def _totals(outcome: Outcome) -> list[str]:
    rows = [
        (name, whole(before), whole(after), difference(before, after))
        for name, before, after in facts.totals_rows(outcome)
    ]
    return ["### Totals", "", *table(("", "before", "after", "difference"), rows, "lrrr")] if rows else []


def _checks(outcome: Outcome) -> list[str]:
    checks = outcome.verification.checks if outcome.verification else {}
    rows = [
        (prose(name), str(facts.check_result(outcome, name) or ABSENT), prose(said))
        for name, said in checks.items()
    ]
    return ["### Verification", "", *table(("check", "result", "what it showed"), rows)] if rows else []


def _ledger(outcome: Outcome) -> list[str]:
    rows = [(prose(entry.kind), code(entry.where), prose(entry.what)) for entry in facts.lost(outcome)]
    return ["### Lost or changed", "", *table(("kind", "where", "what"), rows)] if rows else []


def _keys(outcome: Outcome) -> list[str]:
    rows = [_key_row(group) for group in facts.all_groups(outcome) if facts.changes_keys(group)]
    if not rows:
        return []
    # Long and seldom read, so it starts folded.
    head = ("removed", "renamed", "added")
    return [
        "<details><summary>Keys removed, renamed, added</summary>",
        "",
        *table(head, rows),
        "</details>",
        "",
    ]


def _key_row(group: GroupReport) -> tuple[str, str, str]:
    renamed = [f"{code(old)} → {code(new)}" for old, new in group.keys_renamed]
    return (
        ", ".join(map(code, group.keys_removed)),
        ", ".join(renamed),
        ", ".join(map(code, group.keys_added)),
    )


def _files(outcome: Outcome) -> list[str]:
    lines = []
    for role, file in facts.files(outcome):
        kind = f" ({prose(file.format)})" if file.format else ""
        lines.append(f"- **{role}** {code(file.path)}{kind}, {size(file.bytes)}")
        lines += [f"  - sha256 {code(file.sha256)}"] if file.sha256 else []
        lines += [f"  - {prose(notice)}" for notice in file.notices]
    lines += [f"- **code** {code(entry.where)}, {prose(entry.what)}" for entry in facts.consents(outcome)]
    return ["### Files", "", *lines, ""] if lines else []


def _environment(outcome: Outcome) -> list[str]:
    versions = [f"{prose(name)} {prose(value)}" for name, value in sorted(outcome.environment.items())]
    peak = outcome.peak_memory
    memory = [f"{size(peak)} of memory at most, mapped files among them"] if peak is not None else []
    return [", ".join([*versions, *memory]), ""] if versions or memory else []
