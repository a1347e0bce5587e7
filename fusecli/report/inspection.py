"""What `inspect` found, for a person: facts first, then what fusing would take, marked as the guess it is."""

from __future__ import annotations

from rich.cells import set_cell_size
from rich.console import Console

from fusecli.contents import Contents, Role
from fusecli.outcome import Judgement
from fusecli.report.figures import counted, size
from fusecli.report.marks import CAUTION, mark
from fusecli.report.module_table import families
from fusecli.report.page import Page, shortened
from fusecli.report.proposal import LINES, NAMED, print_draft, print_guess, some


def print_contents(contents: Contents, console: Console, command: str) -> None:
    """Writes the facts within the console's width. `command` is the `fusecli fuse` line that comes next."""
    page = Page(console)
    page.line(("fusecli inspect", "bold"))
    for section in (_file, _artifact, _modules, _norms, print_guess, print_draft):
        section(page, contents)
    _last(page, contents, command)


def _file(page: Page, contents: Contents) -> None:
    file = contents.file
    shards = f" in {counted(contents.shards, 'shard')}" if contents.shards else ""
    page.hanging("file", f"{file.path} ({file.format}{shards}, {size(file.bytes)})")
    page.hanging("sha256", file.sha256 or "", style="dim")
    for label, notice in zip(["notes", *[""] * len(file.notices)], file.notices, strict=False):
        page.hanging(label, notice)
    tensors = sum(dtype.tensors for dtype in contents.dtypes)
    page.hanging("holds", f"{counted(tensors, 'tensor')} in {counted(len(contents.modules), 'module')}")
    kinds = (f"{dtype.tensors:,} {dtype.dtype} ({size(dtype.bytes)})" for dtype in contents.dtypes)
    page.hanging("dtypes", ", ".join(kinds))
    for tie in contents.ties[:NAMED]:
        page.hanging("tied", f"{some(tie)}: one and the same memory")
    if len(contents.ties) > NAMED:
        page.hanging("", f"and {len(contents.ties) - NAMED} more ties", style="dim")
    if contents.others:
        page.hanging("no tensors", f"{some(contents.others)}: extra state, which fuse carries as it is")


def _artifact(page: Page, contents: Contents) -> None:
    artifact = contents.artifact
    if artifact is None:
        return
    page.title("Artifact of fusecli", shortened(page.show(artifact.mode), 20))
    rules = ", ".join(f"{count} × {rule}" for rule, count in artifact.rules.items())
    page.hanging("groups", f"{len(artifact.groups)}: {rules}")
    for group in artifact.groups[:NAMED]:
        page.hanging("", " + ".join(group), style="dim")
    if len(artifact.groups) > NAMED:
        page.hanging("", f"and {len(artifact.groups) - NAMED} more", style="dim")
    page.hanging("input sha", artifact.input_sha256, style="dim")
    if artifact.spec_sha256:
        page.hanging("spec sha", artifact.spec_sha256, style="dim")
    page.hanging("with", ", ".join(f"{name} {text}" for name, text in sorted(artifact.versions.items())))


def _modules(page: Page, contents: Contents) -> None:
    found = families(contents.modules)
    if not found:
        return
    page.title("Modules that hold tensors", str(len(contents.modules)))
    column = min(
        max(len(page.show(family.pattern)) for family in found) + 11, max(page.width // 2, page.width - 34)
    )
    for family in found[:LINES]:
        count = f"{family.count:>4} × " if family.count > 1 else " " * 7
        label = set_cell_size(shortened(count + page.show(family.pattern), column - 4), column - 4)
        page.hanging(
            label, family.text, label_style="", style="" if family.role is Role.NORM else "dim", column=column
        )
    if len(found) > LINES:
        page.hanging("…", f"{len(found) - LINES} more lines; --json has every module", style="dim", column=7)


def _norms(page: Page, contents: Contents) -> None:
    norms = contents.norms
    if not norms:
        return
    page.title("Norm layers", f"{len(norms)} with running statistics")
    channels = sorted({norm.channels for norm in norms})
    each = " to ".join(f"{count:,}" for count in dict.fromkeys((channels[0], channels[-1])))
    page.hanging("channels", f"{each}, {sum(norm.channels for norm in norms):,} in all")
    for norm in [norm for norm in norms if norm.flaws][:LINES]:
        page.hanging("unfit", f"{norm.path}: {'; '.join(norm.flaws)}", style="red", label_style="red")
    untrained = [norm.path for norm in norms if norm.untrained]
    if untrained:
        said = f"mean 0 and variance 1 everywhere in {len(untrained)} of {len(norms)} ({some(untrained)})"
        page.hanging(
            "untrained", f"{said}: with such statistics most wrong folds cannot be seen", style=CAUTION
        )
    elif not any(norm.flaws for norm in norms):
        page.hanging("statistics", "trained and finite in all of them")


def _last(page: Page, contents: Contents, command: str) -> None:
    unfit = any(norm.flaws for norm in contents.norms)
    sign, style = mark(Judgement.DIFFERENT if unfit else None)
    if contents.artifact is not None:
        title, step = "fused already", "load it with fusecli.load_fused(model, path)"
    elif not contents.norms:
        title, step = "nothing to fold: no layer keeps running statistics", ""
    else:
        title = f"{counted(len(contents.norms), 'norm layer')}, {len(contents.candidates)} in guessed pairs"
        step = command
    page.blank()
    page.line(("─" * page.width, style))
    page.line((f"{sign} ", style), (page.show(title), "bold"))
    if step:
        page.command("next", step)
