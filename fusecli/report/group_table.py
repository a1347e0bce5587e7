"""The table of groups: what folded into what, and each group's errors in one line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import set_cell_size

from fusecli.outcome import Evidence, GroupReport
from fusecli.report import facts
from fusecli.report.figures import counted, scientific, times
from fusecli.report.marks import CAUTION, status_mark
from fusecli.report.page import Page, shortened

# Renamed keys and int8 hazards that are named on the terminal; the other renderings have all.
_NAMED = 3
_COLUMN = 10
# Narrower pages keep the ratio that is judged, and leave out the drift it is made of.
_ROOMY = 70


def print_groups(page: Page, groups: Sequence[GroupReport]) -> None:
    if not groups:
        return
    page.title("Groups", str(len(groups)))
    for fold in facts.folds(groups):
        kinds = f"{' + '.join(fold.before)} → {' + '.join(fold.after)}" if fold.before else ""
        page.hanging(f"{fold.count:>3} × {page.show(fold.rule)}", kinds, column=28)
    page.blank()
    page.line((_columns(page, "float64 error", "drift", "× noise").rjust(page.width), "dim"))
    notable = facts.notable_groups(groups)
    for group in notable:
        _group(page, group)
    _hidden(page, len(groups) - len(notable))
    _keys(page, groups)
    _hazards(page, groups)


def _hidden(page: Page, count: int) -> None:
    if count:
        page.hanging(
            "…", f"{count:,} more, none with larger errors; --report json=PATH has all", style="dim", column=4
        )


def _group(page: Page, group: GroupReport) -> None:
    sign, style = status_mark(group.status)
    error, drift = scientific(group.float64_error), scientific(group.drift)
    numbers = _columns(page, error, drift, times(facts.drift_ratio(group)))
    claimed = str(group.evidence) if group.evidence is Evidence.CLAIMED else ""
    room = page.width - 4 - len(numbers) - len(claimed)
    names = set_cell_size(shortened(page.show(braced(group.modules)), room - 1), room)
    page.line((f"  {sign} ", style), (names, ""), (claimed, CAUTION), (numbers, ""))
    for kept in group.kept:
        page.hanging("", f"{kept} stays where it is", style="dim", column=6)
    for note in (*group.notes, *facts.unreal(group)):
        page.hanging("", note, style="dim", column=6)


def _columns(page: Page, error: str, drift: str, noise: str) -> str:
    columns = (error, drift, noise) if page.width >= _ROOMY else (error, noise)
    return "".join(f"{column:>{_COLUMN}}" for column in columns)


def braced(modules: Sequence[str]) -> str:
    """layer1.0.{conv1, bn1, relu}: the path that the members share, once, as in a shell."""
    paths = [module.split(".") for module in modules]
    shared = 0
    while len(paths) > 1 and all(len(path) > shared + 1 for path in paths):
        if len({path[shared] for path in paths}) > 1:
            break
        shared += 1
    if not shared:
        return " + ".join(modules)
    members = ", ".join(".".join(path[shared:]) for path in paths)
    return f"{'.'.join(paths[0][:shared])}.{{{members}}}"


def _keys(page: Page, groups: Sequence[GroupReport]) -> None:
    renamed = facts.renames(groups)
    removed = sum(len(group.keys_removed) for group in groups)
    added = sum(len(group.keys_added) for group in groups)
    if not (renamed or removed or added):
        return
    page.blank()
    page.hanging("keys", f"{removed:,} removed, {added:,} added, {len(renamed):,} renamed")
    for old, new in renamed[:_NAMED]:
        page.hanging("", f"{old} → {new}", style="dim")
    if len(renamed) > _NAMED:
        page.hanging("", f"and {len(renamed) - _NAMED:,} more renamed", style="dim")


def _hazards(page: Page, groups: Sequence[GroupReport]) -> None:
    hazards = facts.int8_hazards(groups)
    if not hazards:
        return
    said = f"per-channel weight ranges differ more than {facts.INT8_HAZARD:.0f}-fold after folding in "
    page.hanging("int8", said + counted(len(hazards), "group"), style=CAUTION)
    for group in hazards[:_NAMED]:
        change = f"{times(group.weight_range_before)} → {times(group.weight_range_after)}"
        page.hanging("", f"{braced(group.modules)}: {change}", style="dim")
