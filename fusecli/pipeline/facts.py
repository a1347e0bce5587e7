"""Facts for the report that no step of the work needs: files, totals, norms that are left, versions."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch
from torch import nn

from fusecli.checkpoint import Checkpoint, sha256_file
from fusecli.engine import Decision
from fusecli.graph.dataflow import Recording
from fusecli.graph.kinds import norms
from fusecli.outcome import ASKED, FileFacts, LedgerEntry, Totals, Unfused
from fusecli.pipeline.fold import Layout
from fusecli.plain import some
from fusecli.source.samples import STATISTICS
from fusecli.spec import Spec

_VARIANCE = ".running_var"
_NOT_LISTED = ("not-listed", "no group of the spec names it")


def input_facts(checkpoint: Checkpoint) -> FileFacts:
    path = str(checkpoint.path)
    return FileFacts(path, checkpoint.format, checkpoint.nbytes, checkpoint.sha256(), checkpoint.notices)


def output_facts(path: object, written: Checkpoint) -> FileFacts:
    """The file that is (or would be) at `path`."""
    return FileFacts(str(path), written.format, written.nbytes, sha256_file(written.path))


def file_facts(path: Path, fmt: str) -> FileFacts:
    """A file as it is on disk."""
    return FileFacts(str(path), fmt, path.stat().st_size, sha256_file(path))


def spec_facts(spec: Spec) -> FileFacts | None:
    return (
        FileFacts(str(spec.source), "YAML", spec.source.stat().st_size, spec.sha256) if spec.source else None
    )


def other_file_ledger(path: object, own: str | None, noted: str, made: str) -> list[LedgerEntry]:
    """What was made from other bytes is judged by its tensors all the same; that it was is said."""
    if own == noted:
        return []
    what = (
        f"is not the file that the {made} was made from (sha256): made from another file, {noted[:12]}..., "
        f"this one is {str(own)[:12]}..."
    )
    return [LedgerEntry("input", str(path), what)]


def environment() -> dict[str, str]:
    return {
        "fusecli": version("fusecli"),
        "torch": str(torch.__version__),
        "safetensors": version("safetensors"),
        "python": platform.python_version(),
        "platform": platform.system(),
    }


def peak_memory() -> int | None:
    """The bytes that this process has had in memory at most, mapped files among them; None: nobody knows."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # no Linux
        return None


def versions() -> dict[str, str]:
    """Those that may change the bytes of an artifact."""
    return {name: text for name, text in environment().items() if name in ("fusecli", "torch")}


def layout_of(checkpoint: Checkpoint) -> Layout:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}


def totals(layout: Layout, model: nn.Module | None) -> Totals:
    """Counts of what is stored; modules only where the model's code was at hand."""
    parameters = sum(prod(shape) for name, (_, shape) in layout.items() if not name.endswith(STATISTICS))
    size = sum(prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    named = dict(model.named_modules()) if model is not None else {}
    acting = [module for path, module in named.items() if path and not isinstance(module, nn.Identity)]
    norm_layers = (
        len(list(norms(named))) if model is not None else sum(n.endswith("running_var") for n in layout)
    )
    return Totals(len(acting) if model is not None else None, parameters, size, norm_layers)


def residual_ledger(layers: Iterable[str]) -> list[LedgerEntry]:
    """What no edit of modules can reach: code `bare-identity`."""
    what = (
        "its own input is added to its output by an operator; if an nn.Identity gave it, it would become "
        "part of the layer, one addition less"
    )
    return [LedgerEntry("bare-identity", path, what) for path in layers]


def unlisted_norms(checkpoint: Checkpoint, modules: Mapping[str, nn.Module]) -> tuple[Unfused, ...]:
    """Norms of a bare state dict that no group names: nothing is known of them but their statistics."""
    found = (name.removesuffix(_VARIANCE) for name in checkpoint.tensors if name.endswith(_VARIANCE))
    return tuple(Unfused(path, "norm", *_NOT_LISTED) for path in found if path not in modules)


def statistics_ledger(checkpoint: Checkpoint, modules: Iterable[str]) -> list[LedgerEntry]:
    """Norms that were never trained: with mean 0 and variance 1 most wrong folds are invisible."""
    entries = []
    for path in dict.fromkeys(modules):
        mean, var = (checkpoint.tensors.get(f"{path}.{name}") for name in ("running_mean", "running_var"))
        if mean and var and not mean.load().any() and bool((var.load() == 1).all()):
            entries.append(LedgerEntry("statistics", path, "untrained: mean 0, variance 1 in every channel"))
    return entries


def tie_ledger(checkpoint: Checkpoint, kept: Collection[str]) -> list[LedgerEntry]:
    """Tied tensors are written under each name; load_fused ties again what the model ties."""
    return [
        LedgerEntry("tie", tie[0], f"is the same memory as {', '.join(tie[1:])}; written under each name")
        for tie in checkpoint.ties
        if set(tie) <= set(kept)
    ]


def caveat_ledger(decisions: Iterable[Decision], recording: Recording | None) -> list[LedgerEntry]:
    """What the recorded run could not show."""
    asked = recording.asked if recording is not None else ()
    by_size = recording.by_size if recording is not None else ()
    other_way = "forward decides by sizes here: at others than were tried it may go another way"
    return [
        *(LedgerEntry("assumed", place, ASKED) for place in asked),
        *([LedgerEntry("sizes", some(by_size), other_way)] if by_size else []),
        *_caveats(decisions),
    ]


def path_ledger(decisions: Iterable[Decision]) -> list[LedgerEntry]:
    """Modules beside those of a group that no input has run."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for decision in decisions:
        if decision.unrun:
            groups.setdefault(decision.unrun, []).append(" + ".join(decision.members))
    return [
        LedgerEntry(
            "assumed",
            some(paths),
            f"no input ran it: the fold of {some(folded)} holds for inputs that do not",
        )
        for paths, folded in groups.items()
    ]


def _caveats(decisions: Iterable[Decision]) -> list[LedgerEntry]:
    return [
        LedgerEntry("assumed", decision.members[0], caveat)
        for decision in decisions
        for caveat in decision.caveats
    ]


def unshared_ledger(roots: Iterable[str]) -> list[LedgerEntry]:
    """Modules that `shared: clone` has given a copy of their own: no tie is broken silently."""
    return [LedgerEntry("tie", root, "was shared; it has a copy of its own now") for root in roots]
