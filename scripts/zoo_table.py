"""`scripts/bench zoo`: how many norms of pytorchcv's architectures are folded, beside torch's own two fusers.

Each architecture is built without trained weights, its norms get random statistics, and it is measured in a
process of its own. A norm counts as folded once it no longer runs. The error is max|a - b| / max|a| of the
outputs in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusecli.consent import Consent
from fusecli.engine import Decision
from fusecli.outcome import Refusal
from fusecli.pipeline.fold import Fold, apply_fold
from fusecli.pipeline.select import Selection, record_and_select
from fusecli.pipeline.settle import settle
from fusecli.sample import Sample
from fusecli.source.resolve import in_memory
from fusecli.spec import spec_from_mapping
from tests.zoo.networks import (
    Zoo,
    built,
    constructors,
    far,
    names_moved,
    ran,
    sample_for,
    trained,
)

FOLDER = Path(__file__).resolve().parent
NETWORKS = FOLDER / "zoo_networks.txt"
RESULTS = FOLDER.parent / "bench-results" / "zoo.json"
SECONDS = 240  # for one architecture
WRONG = 1e-6  # an error of rounding in float64 is far below, a wrong fold far above


@dataclass(frozen=True)
class Tool:
    """What one tool did to one architecture.

    folded   norms that no longer run
    error    against the original; None where there is no result
    trouble  why there is no result
    """

    folded: int = 0
    error: float | None = None
    trouble: str = ""

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error <= WRONG


@dataclass(frozen=True)
class Row:
    """One architecture.

    norms    norms with running statistics that run
    left     how many of them still run, by reason code
    seconds  to record and plan
    moved    its class, if that changed, and state-dict keys whose names did
    """

    name: str
    family: str = ""
    norms: int = 0
    ours: Tool = Tool()
    left: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    moved: tuple[str, ...] = ()
    theirs: dict[str, Tool] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not (self.ours.trouble or self.ours.wrong or self.moved or "unaccounted" in self.left)


def listed() -> list[str]:
    """The architectures of the table, family by family."""
    lines = NETWORKS.read_text().splitlines()
    return [name for line in lines if not line.startswith("#") for name in line.partition(":")[2].split()]


def main(words: list[str]) -> int:
    read = argparse.ArgumentParser(prog="scripts/bench zoo", description=__doc__)
    read.add_argument("--models", nargs="+", default=listed(), metavar="N|NAME", help="the first N, or these")
    read.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="where the rows are written")
    read.add_argument("--markdown", action="store_true", help="print the tables of the README")
    asked = read.parse_args(words)
    names = listed()[: int(asked.models[0])] if asked.models[0].isdigit() else asked.models
    zoo = constructors()
    if unknown := [name for name in names if name not in zoo]:
        read.error(f"pytorchcv has no {', '.join(unknown)}")
    torch.set_num_threads(1)
    start, rows = time.perf_counter(), []
    warm()
    for name in names:
        rows.append(in_a_process(zoo, name))
        print(f"{len(rows):3} of {len(names)}  {'  '.join(cells(rows[-1]))}", file=sys.stderr, flush=True)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print("\n".join([*summary(rows), *(["", *details(rows)] if asked.markdown else ())]))
    return 0 if all(row.good for row in rows) else 1


def warm() -> None:
    """One small network in this process: what is imported late is imported before the clock runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
        for fuse in (lambda model: ours(model, Sample((torch.ones(1, 1, 1, 1),))), fx_fuse, fuse_fx):
            fuse(copy.deepcopy(model))


def in_a_process(zoo: Zoo, name: str) -> Row:
    """The row of one architecture; one that crashes or hangs has a row too."""
    forked = multiprocessing.get_context("fork")  # torch and the zoo are imported already
    receiver, sender = forked.Pipe(duplex=False)
    process = forked.Process(target=child, args=(zoo, name, sender))
    process.start()
    sender.close()
    family = zoo[name].__module__.rpartition(".")[2]
    try:
        row: Row = receiver.recv() if receiver.poll(SECONDS) else Row(name, ours=Tool(trouble="over time"))
    except EOFError:
        row = Row(name, ours=Tool(trouble="crashed"))
    process.kill()
    process.join()
    return replace(row, family=family)


def child(zoo: Zoo, name: str, sender: Connection) -> None:
    warnings.simplefilter("ignore")
    try:
        row = measured(zoo, name)
    except Exception as error:
        row = Row(name, ours=Tool(trouble=told(error)))
    sender.send(row)


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


def measured(zoo: Zoo, name: str) -> Row:
    torch.set_default_dtype(torch.float64)  # for what is built, and for what a forward makes
    model = trained(built(zoo, name))
    sample = sample_for(name, model).copy(torch.float64)
    expected, norms = ran(model, sample)
    fused, seconds, codes, decisions = ours(model, sample)
    output, still = ran(fused, sample)
    return Row(
        name,
        norms=len(norms),
        ours=Tool(len(norms) - len(still), far(expected, output)),
        left=dict(Counter(codes.get(path, "unaccounted") for path in still)),
        seconds=seconds,
        moved=tuple(names_moved(model, fused, decisions)),
        theirs={
            tool: theirs(fuse, model, sample, expected, len(norms))
            for tool, fuse in (("fx.fuse", fx_fuse), ("fuse_fx", fuse_fx))
        },
    )


def ours(model: nn.Module, sample: Sample) -> tuple[nn.Module, float, dict[str, str], Sequence[Decision]]:
    """A copy with all that discovery offers, the seconds it took to find that out, why each other norm is
    left, and what was decided: what `fusecli.fuse(discover=True, shared="clone")` does, without its proof,
    since the table has its own."""
    spec = spec_from_mapping({"discover": True, "shared": "clone"}, where="scripts/bench")
    source = in_memory(model, spec, Consent.gather(()))

    def attempt(_: Selection, fold: Fold) -> tuple[Fold, Sequence[Refusal]]:
        return fold, ()

    start = time.perf_counter()
    found = settle(record_and_select(spec, source, source.structure(), sample, ()), attempt)
    seconds = time.perf_counter() - start
    assert found.fold is not None
    decisions = found.fold.decisions
    fused, _ = apply_fold(found.fold)
    codes = {unfused.module: unfused.code for unfused in found.selection.unfused(decisions)}
    return fused, seconds, codes, decisions


def theirs(
    fuse: Callable[[nn.Module], nn.Module], model: nn.Module, sample: Sample, expected: Any, norms: int
) -> Tool:
    try:
        fused = fuse(copy.deepcopy(model))
    except Exception as error:
        return Tool(trouble=f"not traced: {told(error)}")
    try:
        output, still = ran(fused, sample)
        return Tool(norms - len(still), far(expected, output))
    except Exception as error:
        return Tool(trouble=f"does not run: {told(error)}")


def fx_fuse(model: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(model, inplace=True)


def fuse_fx(model: nn.Module) -> nn.Module:
    from torch.ao.quantization.quantize_fx import fuse_fx as fuse

    return fuse(model)


def cells(row: Row) -> list[str]:
    """The row as text: name, norms, folded, left, seconds, error, and the other tools."""
    return [
        row.name,
        str(row.norms),
        cell(row.ours),
        ", ".join(f"{code} {count}" for code, count in sorted(row.left.items())),
        f"{row.seconds:.1f}",
        "" if row.ours.error is None else f"{row.ours.error:.0e}",
        *(cell(tool) for tool in row.theirs.values()),
        *(f"moved: {name}" for name in row.moved),
    ]


def cell(tool: Tool) -> str:
    if tool.trouble:
        return tool.trouble.partition(":")[0]
    return f"{tool.folded}, **wrong**" if tool.wrong else str(tool.folded)


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """What all rows come to, as a Markdown table; a result that is wrong counts for nothing."""
    tools = {"fusecli": [row.ours for row in rows]}
    for name in ("fx.fuse", "fuse_fx"):
        tools[name] = [row.theirs.get(name, Tool(trouble=row.ours.trouble)) for row in rows]
    norms = sum(row.norms for row in rows)

    def line(what: str, figure: Callable[[list[Tool]], object]) -> str:
        return f"| {what} | {' | '.join(str(figure(done)) for done in tools.values())} |"

    def right(done: list[Tool]) -> int:
        return sum(tool.folded for tool in done if not tool.wrong)

    def worst(done: list[Tool]) -> str:
        return f"{max((t.error for t in done if t.error is not None and not t.wrong), default=0):.0e}"

    yield f"| {len(rows)} architectures, {norms:,} norms | {' | '.join(tools)} |"
    yield "| --- |" + " --- |" * len(tools)
    yield line("norms folded, outputs the same", lambda done: f"{right(done):,}")
    yield line("of all", lambda done: f"{100 * right(done) / max(norms, 1):.1f} %")
    yield line(
        "architectures without a norm left",
        lambda done: sum(
            tool.folded == row.norms and not tool.wrong for tool, row in zip(done, rows, strict=True)
        ),
    )
    yield line("nothing folded", lambda done: sum(not tool.trouble and tool.folded == 0 for tool in done))
    yield line("cannot be traced, or do not run", lambda done: sum(bool(tool.trouble) for tool in done))
    yield line("outputs differ by more than 1e-6", lambda done: sum(tool.wrong for tool in done))
    yield line("largest error of the others", worst)
    seconds = sorted(row.seconds for row in rows if not row.ours.trouble) or [0.0]
    yield ""
    yield (
        f"Recording and planning took {statistics.median(seconds):.1f} s in the median, {seconds[-1]:.0f} s "
        "at most. The norms that are left, by reason: "
        + ", ".join(f"`{code}` {count:,}" for code, count in reasons(rows).most_common())
        + "."
    )


def reasons(rows: Iterable[Row]) -> Counter[str]:
    return sum((Counter(row.left) for row in rows), Counter())


def details(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each architecture, folded away."""
    yield "<details><summary>Each architecture</summary>"
    yield ""
    yield "| family | architecture | norms | folded | left | s | error | fx.fuse | fuse_fx |"
    yield "| --- |" + " --- |" * 8
    for family, members in groupby(rows, key=lambda row: row.family):
        for number, row in enumerate(members):
            yield f"| {'' if number else family} | {' | '.join(cells(row))} |"
    yield ""
    yield "</details>"
