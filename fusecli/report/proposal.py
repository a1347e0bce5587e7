"""What fusing a checkpoint would take: guessed pairs, what no tensor tells, and a spec to begin with."""

from __future__ import annotations

from collections.abc import Sequence

from fusecli.contents import Candidate, Contents, NormFacts
from fusecli.report.figures import counted
from fusecli.report.marks import CAUTION
from fusecli.report.page import Page, wrapped

# Names shown of a list that may be long, and lines of a table or a draft; --json has all.
NAMED = 3
LINES = 40
_ROOMY = 80
_BEWARE = (
    "A file does not say what its model computes. Where a network runs conv → relu → norm, every pair below "
    "is wrong, and the file looks just the same. Only a run of the model can confirm a pair"
)


def print_guess(page: Page, contents: Contents) -> None:
    if contents.artifact is not None or not contents.norms:
        return
    page.title("To fuse it")
    page.hanging("guess", _guessed(contents), style=CAUTION)
    if contents.candidates:
        page.hanging("beware", _BEWARE, style=CAUTION, label_style=CAUTION)
    paired = {candidate.norm for candidate in contents.candidates}
    unpaired = [norm.path for norm in contents.norms if norm.path not in paired]
    if unpaired:
        page.hanging("unpaired", some(unpaired))
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


def print_draft(page: Page, contents: Contents) -> None:
    if not contents.draft:
        return
    remark = "copy it to fuse.yaml, name your model, strike out what is wrong"
    page.title("Draft of a spec", remark if page.width >= _ROOMY else "")
    lines = contents.draft.splitlines()
    for line in lines[:LINES]:
        text = line.lstrip(" ")
        # Every line is moved by the same two spaces, so that what is copied is still YAML.
        column = 2 + len(line) - len(text)
        for part in wrapped(page.show(text), page.width - column):
            page.line((" " * column + part, ""))
    if len(lines) > LINES:
        page.hanging(
            "…", f"{len(lines) - LINES} more lines; --json has the whole draft", style="dim", column=4
        )


def some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(name or "(the model itself)" for name in names[:NAMED]) + more
