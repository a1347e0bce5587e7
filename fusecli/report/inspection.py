"""What `inspect` found, for a person: facts first, then what fusing would take, marked as the guess it is."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import set_cell_size
from rich.console import Console

from fusecli.contents import Candidate, Contents, NormFacts, Role
from fusecli.outcome import Judgement
from fusecli.report.figures import counted, size
from fusecli.report.marks import CAUTION, mark
from fusecli.report.module_table import families
from fusecli.report.page import Page, shortened, wrapped

# Names shown of a list that may be long, and lines of a table or a draft; --json has all.
_NAMED = 3
_LINES = 40
_ROOMY = 80
_BEWARE = (
    "A file does not say what its model computes. Where a network runs conv → relu → norm, every pair below "
    "is wrong, and the file looks just the same. Only a run of the model can confirm a pair"
)


def print_contents(contents: Contents, console: Console, command: str) -> None:
    """Writes the facts within the console's width. `command` is the `fusecli fuse` line that comes next."""
    page = Page(console)
    page.line(("fusecli inspect", "bold"))
    for section in (_file, _artifact, _modules, _norms, _guess, _draft):
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
    for tie in contents.ties[:_NAMED]:
        page.hanging("tied", f"{_some(tie)}: one and the same memory")
    if len(contents.ties) > _NAMED:
        page.hanging("", f"and {len(contents.ties) - _NAMED} more ties", style="dim")
    if contents.others:
        page.hanging(
            "no tensors", f"{_some(contents.others)}: fuse takes a state dict of tensors only", style=CAUTION
        )


def _artifact(page: Page, contents: Contents) -> None:
    artifact = contents.artifact
    if artifact is None:
        return
    page.title("Artifact of fusecli", shortened(page.show(artifact.mode), 20))
    rules = ", ".join(f"{count} × {rule}" for rule, count in artifact.rules.items())
    page.hanging("groups", f"{len(artifact.groups)}: {rules}")
    for group in artifact.groups[:_NAMED]:
        page.hanging("", " + ".join(group), style="dim")
    if len(artifact.groups) > _NAMED:
        page.hanging("", f"and {len(artifact.groups) - _NAMED} more", style="dim")
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
    for family in found[:_LINES]:
        count = f"{family.count:>4} × " if family.count > 1 else " " * 7
        label = set_cell_size(shortened(count + page.show(family.pattern), column - 4), column - 4)
        page.hanging(
            label, family.text, label_style="", style="" if family.role is Role.NORM else "dim", column=column
        )
    if len(found) > _LINES:
        page.hanging("…", f"{len(found) - _LINES} more lines; --json has every module", style="dim", column=7)


def _norms(page: Page, contents: Contents) -> None:
    norms = contents.norms
    if not norms:
        return
    page.title("Norm layers", f"{len(norms)} with running statistics")
    channels = sorted({norm.channels for norm in norms})
    each = " to ".join(f"{count:,}" for count in dict.fromkeys((channels[0], channels[-1])))
    page.hanging("channels", f"{each}, {sum(norm.channels for norm in norms):,} in all")
    for norm in [norm for norm in norms if norm.flaws][:_LINES]:
        page.hanging("unfit", f"{norm.path}: {'; '.join(norm.flaws)}", style="red", label_style="red")
    untrained = [norm.path for norm in norms if norm.untrained]
    if untrained:
        said = f"mean 0 and variance 1 everywhere in {len(untrained)} of {len(norms)} ({_some(untrained)})"
        page.hanging(
            "untrained", f"{said}: with such statistics most wrong folds cannot be seen", style=CAUTION
        )
    elif not any(norm.flaws for norm in norms):
        page.hanging("statistics", "trained and finite in all of them")


def _guess(page: Page, contents: Contents) -> None:
    if contents.artifact is not None or not contents.norms:
        return
    page.title("To fuse it")
    page.hanging("guess", _guessed(contents), style=CAUTION)
    if contents.candidates:
        page.hanging("beware", _BEWARE, style=CAUTION, label_style=CAUTION)
    paired = {candidate.norm for candidate in contents.candidates}
    unpaired = [norm.path for norm in contents.norms if norm.path not in paired]
    if unpaired:
        page.hanging("unpaired", _some(unpaired))
    page.hanging("unknown", _unknown(contents.norms, contents.candidates))
    page.hanging("known by", "model.factory and inputs: fusecli then asks the modules and runs them")


def _guessed(contents: Contents) -> str:
    count = f"{len(contents.candidates)} of {counted(len(contents.norms), 'norm')}"
    if contents.alphabetical:
        return f"by name, {count} may follow a layer of as many outputs (sorted keys have no order to go by)"
    return f"by key order, {count} may follow a layer of as many outputs"


def _unknown(norms: Sequence[NormFacts], candidates: Sequence[Candidate]) -> str:
    """What no tensor tells about these layers."""
    said = [
        f"eps of {counted(len(norms), 'norm')} (never guessed)",
        "what runs between two modules, and how often",
    ]
    either = sum(candidate.transposed is None for candidate in candidates)
    transposed = sum(candidate.transposed is True for candidate in candidates)
    if either:
        said.append(f"how to read {counted(either, 'square weight')} (a convolution's or a transposed one's)")
    if transposed:
        said.append(f"the groups of {counted(transposed, 'transposed convolution')} (transposed by shape)")
    return "; ".join(said)


def _draft(page: Page, contents: Contents) -> None:
    if not contents.draft:
        return
    remark = "copy it to fuse.yaml, name your model, strike out what is wrong"
    page.title("Draft of a spec", remark if page.width >= _ROOMY else "")
    lines = contents.draft.splitlines()
    for line in lines[:_LINES]:
        text = line.lstrip(" ")
        # Every line is moved by the same two spaces, so that what is copied is still YAML.
        column = 2 + len(line) - len(text)
        for part in wrapped(page.show(text), page.width - column):
            page.line((" " * column + part, ""))
    if len(lines) > _LINES:
        page.hanging(
            "…", f"{len(lines) - _LINES} more lines; --json has the whole draft", style="dim", column=4
        )


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


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(name or "(the model itself)" for name in names[:_NAMED]) + more
