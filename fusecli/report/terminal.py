"""The report for a person: details first, the verdict in the last lines, where the eye is."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console

from fusecli.outcome import Judgement, Outcome, Refusal
from fusecli.report import facts
from fusecli.report.figures import counted, difference, size, whole
from fusecli.report.group_table import print_groups
from fusecli.report.int8 import print_int8
from fusecli.report.marks import STYLES, mark
from fusecli.report.page import Page, shortened
from fusecli.report.wording import MORE, grounds, headline, next_step

_LABEL_STYLES = {
    "claimed": STYLES[Judgement.INCONCLUSIVE],
    "differs": STYLES[Judgement.DIFFERENT],
    "problem": STYLES[Judgement.DIFFERENT],
}
# How many modules are named where many share one reason; the JSON report names all.
_NAMED = 3


def print_terminal(outcome: Outcome, console: Console) -> None:
    """Writes the report within the console's width; colour and alphabet are the console's to decide."""
    page = Page(console)
    page.line((shortened(page.show(_command(outcome)), page.width), "bold"))
    _files(page, outcome)
    if outcome.quantization is None:
        print_groups(page, facts.all_groups(outcome))
    else:
        print_int8(page, outcome.quantization)
    for section in (_refused, _unfused, _ledger, _totals, _checks, _verdict):
        section(page, outcome)


def _command(outcome: Outcome) -> str:
    return outcome.command if outcome.command.startswith("fusecli") else f"fusecli {outcome.command}"


def _files(page: Page, outcome: Outcome) -> None:
    for role, file in facts.files(outcome):
        kind = f"{file.format}, " if file.format else ""
        page.hanging(role, f"{file.path} ({kind}{size(file.bytes)})")
        if file.sha256:
            page.hanging("sha256", file.sha256, style="dim")
        for notice in file.notices:
            page.hanging("", notice)
    for entry in facts.consents(outcome):
        page.hanging("code", f"{entry.where}, {entry.what}")
    if outcome.environment:
        versions = (f"{name} {value}" for name, value in sorted(outcome.environment.items()))
        page.hanging("with", ", ".join(versions))
    if outcome.peak_memory is not None:
        page.hanging("memory", f"{size(outcome.peak_memory)} at most, mapped files among them")


def _refused(page: Page, outcome: Outcome) -> None:
    if outcome.refused:
        page.title("Refused", counted(len(outcome.refused), "group"))
    for refusal in outcome.refused:
        _refusal(page, refusal)
    if outcome.refused:
        page.line((f"  {MORE}", "dim"))


def _refusal(page: Page, refusal: Refusal) -> None:
    sign, style = mark(Judgement.DIFFERENT)
    names = shortened(page.show(" + ".join(refusal.group)), page.width - 4)
    page.line((f"  {sign} ", style), (names, "bold"))
    by = f" ({refusal.rule})" if refusal.rule else ""
    page.hanging("  why", f"{refusal.code}{by}: {refusal.reason}")
    for seen in refusal.evidence:
        page.hanging("  seen", seen)
    if refusal.remedy:
        page.hanging("  remedy", refusal.remedy)


def _unfused(page: Page, outcome: Outcome) -> None:
    if outcome.unfused:
        page.title("Norms left", str(len(outcome.unfused)))
    for (kind, code, reason), modules in facts.unfused_kinds(outcome.unfused).items():
        named = ", ".join(modules[:_NAMED])
        more = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
        page.hanging("·", f"{kind} {named}{more}", column=4)
        page.hanging("", f"{code}: {reason}", style="dim", column=4)


def _ledger(page: Page, outcome: Outcome) -> None:
    if facts.lost(outcome):
        page.title("Lost or changed")
    for entry in facts.lost(outcome):
        page.hanging(page.show(entry.kind), f"{entry.where}: {entry.what}", column=18)


def _totals(page: Page, outcome: Outcome) -> None:
    rows = facts.totals_rows(outcome)
    if not rows:
        return
    page.title("Totals")
    column = 2 + max(len(whole(count)) for _, *counts in rows for count in (*counts, 100_000))
    page.line((f"  {'':11}{'before':>{column}}{'after':>{column}}", "dim"))
    for name, before, after in rows:
        numbers = f"{whole(before):>{column}}{whole(after):>{column}}"
        change = f"  {difference(before, after)}"
        # Half a number would be a wrong number, so a narrow page goes without.
        fits = 13 + len(numbers) + len(change) <= page.width
        page.line((f"  {name:11}", "dim"), (numbers, ""), (change if fits else "", "dim"))


def _checks(page: Page, outcome: Outcome) -> None:
    checks = outcome.verification.checks if outcome.verification else {}
    if checks:
        page.title("Verification" if outcome.quantization is None else "Verification of the fold")
    for name, said in checks.items():
        sign, style = mark(facts.check_result(outcome, name))
        page.hanging(f"{sign} {page.show(name)}", said, column=16, label_style=style)


def _verdict(page: Page, outcome: Outcome) -> None:
    head = headline(outcome)
    sign, style = mark(head.judgement)
    page.blank()
    page.line(("─" * page.width, style))
    title = shortened(page.show(head.title), page.width - 2)
    beside = cell_len(f"{sign} {title}  {head.detail}") <= page.width
    page.line((f"{sign} ", style), (title, f"bold {style}"), (f"  {head.detail}" if beside else "", "dim"))
    if not beside:
        page.hanging("", head.detail, style="dim", column=4)
    for label, sentence in grounds(outcome):
        page.hanging(label, sentence, label_style=_LABEL_STYLES.get(label, "dim"))
    if next_step(outcome):
        page.command("next", next_step(outcome))
