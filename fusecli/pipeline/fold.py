"""Folding a source: planned without numbers, then group by group, each tensor read once and rounded once.

Only the tensors of one group are in memory at a time where a checkpoint is folded into a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fusecli.algebra.blocks import undivided
from fusecli.checkpoint import in_text, write_pt, write_safetensors
from fusecli.engine import Decision, Group, Plan, alone, baking, compute, owning, plan, refusal, replaced
from fusecli.errors import NotFoldable, Problem, UsageError
from fusecli.graph.held import holds
from fusecli.graph.kinds import kind_of
from fusecli.graph.materialise import duplicate
from fusecli.graph.record import Run
from fusecli.graph.stand_in import hints_of
from fusecli.outcome import LedgerEntry, Refusal, Unfused
from fusecli.pipeline.learned import Learned, learned
from fusecli.pipeline.weight_ranges import Ranges, weight_range
from fusecli.rewrite import (
    MANIFEST_KEY,
    Edit,
    GroupRecord,
    KeyMap,
    Manifest,
    Rewrite,
    TrainedRecord,
    apply_edits,
    apply_rewrite,
)
from fusecli.rewrite.tree import ModuleTree
from fusecli.source.source import InMemory, Source, Structure

_No = TypeVar("_No", Refusal, Unfused)
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Progress = Callable[[str], None]


class Refused(Exception):
    """Some groups cannot be fused, so none is; carries all the refusals."""

    def __init__(self, refused: Iterable[Refusal]) -> None:
        self.refused = tuple(refused)
        super().__init__(f"{len(self.refused)} groups refused")


@dataclass(frozen=True)
class Fold:
    """A planned fold of one source: what will be made of each group.

    done      groups that are fused already
    rewrites  of each decision; of a file without numbers, but for what a custom fuser has made
    """

    source: Source
    structure: Structure
    decisions: tuple[Decision, ...]
    done: tuple[Group, ...]
    rewrites: tuple[Rewrite, ...]

    @cached_property
    def members(self) -> list[str]:
        return [path for decision in self.decisions for path in decision.members]

    @cached_property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(edit for rewrite in self.rewrites for edit in rewrite.edits)

    @cached_property
    def keymap(self) -> KeyMap:
        return KeyMap(self.edits)

    @cached_property
    def hints(self) -> tuple[dict[str, Any], ...]:
        """What the manifest says of each group that no tensor tells."""
        return tuple(_hints(self.structure.tree, decision) for decision in self.decisions)

    @cached_property
    def learned(self) -> Learned:
        """The scales that quantization-aware training has learned, as they are after the fold."""
        members = self.members if self.source.trained else ()
        return learned(self.source, self.decisions, {path: self.member(path) for path in members})

    @cached_property
    def layout(self) -> Layout:
        """Every tensor of the artifact with its dtype and shape; raises UsageError."""
        return _layout(self)

    def member(self, path: str) -> nn.Module:
        """A module of the original with its stored tensors."""
        return self.source.member(path, self.structure)

    def modules(self, decision: Decision) -> dict[str, nn.Module]:
        return {path: self.member(path) for path in decision.members}


def plan_fold(source: Source, structure: Structure, groups: Sequence[Group], run: Run | None = None) -> Fold:
    """Plans every group, of a file without numbers; raises Refused with all that cannot be fused.

    run  a run of the model that each group is audited against
    """
    try:
        planned, rewrites, refused = _planned(source, structure, groups, run)
    except UsageError:
        # A group whose shapes do not fit is why the model does not run.
        planned, rewrites, refused = _planned(source, structure, groups, None)
        if not refused:
            raise
    if refused:
        position = {group.modules: number for number, group in enumerate(groups)}
        told = (still_computed(no, source.unbakeable) for no in refused)
        raise Refused(sorted(told, key=lambda no: position[no.group]))
    fold = Fold(source, structure, planned.decisions, planned.done, tuple(rewrites))
    _ = fold.layout  # a name that is taken is told before there is work
    return fold


def still_computed(no: _No, unbakeable: Mapping[str, str]) -> _No:
    """The refusal, with why `bake: true` has not helped."""
    group: tuple[str, ...] = no.group if isinstance(no, Refusal) else ()
    found: dict[str, str] = {path: why for path, why in unbakeable.items() if not group or path in group}
    if no.code != "parametrized" or not found:
        return no
    return replace(
        no,
        reason=f"{no.reason}, and forward reads those too",
        evidence=(*no.evidence, *(f"{path} made plain: {why}" for path, why in found.items())),
        remedy="leave the group out; `bake: true` makes the other layers plain",
    )


def _planned(
    source: Source, structure: Structure, groups: Sequence[Group], run: Run | None
) -> tuple[Plan, list[Rewrite], list[Refusal]]:
    tree = structure.tree
    baked = [group for group in groups if len(group.modules) == 1 and group.modules[0] in source.bakes]
    planned = plan(tree, [group for group in groups if group not in baked], source.vocabulary, run)
    refused = list(planned.refused)
    decisions = list(planned.decisions)
    for group in baked:
        try:
            decisions.append(alone(tree, group, source.bakes, source.vocabulary, run))
        except NotFoldable as no:
            refused.append(refusal(group, no))
    prepared = (owning(baking(decision, source.bakes), source.unshared) for decision in decisions)
    planned = replace(planned, decisions=tuple(prepared))
    rewrites: list[Rewrite] = []
    with undivided():
        for decision in planned.decisions:
            try:
                rewrites.append(_rewrite(source, structure, decision))
            except NotFoldable as no:
                refused.append(refusal(decision.group, no, decision.rule))
    return planned, rewrites, refused


def _rewrite(source: Source, structure: Structure, decision: Decision) -> Rewrite:
    """What becomes of the members: in memory with their numbers; of a file without, but for what a custom
    fuser makes of them. Raises NotFoldable."""
    if not (decision.custom or isinstance(source, InMemory)):
        return decision.rewrite({path: structure.tree[path] for path in decision.members})
    members = {path: source.member(path, structure) for path in decision.members}
    return compute(decision, members) if isinstance(source, InMemory) else decision.rewrite(members)


def folded(fold: Fold, progress: Progress = lambda _: None) -> Iterator[tuple[int, Rewrite]]:
    """Each group with its numbers: its place and its rewrite.

    Raises Refused after the last group where the numbers of some forbid it (statistics, overflow, a probe).
    """
    refused: list[Refusal] = []
    with undivided():
        for number, decision in enumerate(fold.decisions):
            progress(f"folding group {number + 1} of {len(fold.decisions)}")
            if decision.custom or isinstance(fold.source, InMemory):
                yield number, fold.rewrites[number]
                continue
            try:
                rewrite = compute(decision, fold.modules(decision))
            except NotFoldable as no:
                refused.append(refusal(decision.group, no, decision.rule))
                continue
            yield number, rewrite
    if refused:
        raise Refused(refused)


def range_of(fold: Fold, number: int, rewrite: Rewrite) -> Ranges:
    """What a fold does to the ranges of its layer's weights."""
    layer = fold.decisions[number].members[0]
    return weight_range(fold.member(layer), rewrite, layer)


def write_fold(
    fold: Fold, path: Path, fmt: str, manifest: Callable[[str], Manifest], progress: Progress
) -> dict[int, Ranges]:
    """Folds and writes; raises Refused where a group's numbers forbid it. What became of the weights of each
    group's layer is answered.

    `manifest` makes the manifest from the input's sha256, which is taken while the tensors are written.
    """
    ranges: dict[int, Ranges] = {}
    with fold.source.checkpoint.hashing() as digest:
        tensors = _stream(fold, ranges, progress)

        def metadata() -> dict[str, str]:
            return {MANIFEST_KEY: manifest(digest()).to_json()}

        others = extra_state(fold)
        if fmt == "safetensors":
            text = in_text(others)
            promised = {MANIFEST_KEY: manifest("0" * 64).to_json(), **text}
            write_safetensors(path, fold.layout, tensors, promised, final=lambda: {**metadata(), **text})
        else:
            arrived = dict(tensors)
            write_pt(path, {name: arrived[name] for name in fold.layout}, metadata(), others)
    return ranges


def extra_state(fold: Fold) -> dict[str, object]:
    """What the checkpoint holds beside its tensors, by its names in the artifact."""
    named = ((fold.keymap(key), value) for key, value in fold.source.checkpoint.others.items())
    return {name: value for name, value in named if name is not None}


def edited_structure(fold: Fold) -> tuple[nn.Module, tuple[LedgerEntry, ...]]:
    """The model without numbers as the fold makes it, and what was lost."""
    held = {id(tensor): tensor for tensor in _tensors(fold.structure.model)}
    model = duplicate(fold.structure.model, held)
    return model, apply_edits(ModuleTree(model), fold.edits)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def apply_fold(fold: Fold, *, inplace: bool = False) -> tuple[nn.Module, list[LedgerEntry]]:
    """The model in memory, or a copy of it, with the fold done, and what was lost; in eval mode, unless it is
    to be trained."""
    model, rewrites = fold.structure.original, fold.rewrites
    assert model is not None
    if not inplace:
        # Weights that get a new value need no copy: until then the copy holds the original's own. A module
        # that is held a second time keeps its weights there.
        new, held = replaced(rewrites), {hold.path for hold in holds(model)}
        shared = {
            id(p): p
            for name, p in model.named_parameters()
            if name in new and name.rpartition(".")[0] not in held
        }
        model = duplicate(model, shared)
    if fold.source.vocabulary.mode == "folded":
        model.eval()
    tree = ModuleTree(model)
    lost = [entry for rewrite in rewrites for entry in apply_rewrite(tree, rewrite)]
    if fold.decisions:
        custom = any(decision.custom for decision in fold.decisions)
        named = {decision.group.modules: decision.rule for decision in fold.decisions}
        tree.note_groups(named, custom=custom)
    return model, lost


def manifest_for(fold: Fold, input_sha256: str, **facts: Any) -> Manifest:
    checkpoint = fold.source.checkpoint
    groups = tuple(
        GroupRecord(decision.group.modules, decision.rule, decision.evidence, decision.kept, hints)
        for decision, hints in zip(fold.decisions, fold.hints, strict=True)
    )
    return Manifest(
        fold.source.vocabulary.mode,
        groups,
        fold.edits,
        input_sha256,
        resolved_sha256(groups),
        ties=checkpoint.ties,
        key=checkpoint.nesting or "",
        strip_prefix=checkpoint.prefixes,
        adapter_sha256=fold.source.adapter.sha256 if fold.source.adapter else "",
        trained=trained_record(fold),
        **facts,
    )


def trained_record(fold: Fold) -> TrainedRecord | None:
    """What the manifest says of a checkpoint that quantization-aware training has left."""
    trained = fold.source.trained
    if trained is None:
        return None
    return TrainedRecord(trained.layout, dict(trained.norms), fold.learned.records)


def resolved_sha256(groups: Iterable[GroupRecord]) -> str:
    """The hash of what a spec came down to: patterns bound, rules chosen, in the order of the run. Two specs
    that ask for the same work have the same, and so the same artifact, to the byte."""
    resolved = [[group.modules, group.rule, group.kept, dict(group.hints)] for group in groups]
    return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def _layout(fold: Fold) -> Layout:
    keymap = fold.keymap
    rewritten = {key: tensor for rewrite in fold.rewrites for key, tensor in rewrite.tensors.items()}
    opaque = {path for decision in fold.decisions if decision.custom for path in decision.members}
    layout: Layout = {}
    for key, stored in fold.source.checkpoint.tensors.items():
        new = keymap(key)
        if new is not None and key not in rewritten and not _below(key, opaque):
            layout[new] = (stored.dtype, stored.shape)
    for key, tensor in rewritten.items():
        new = keymap(key)
        assert new is not None
        layout[new] = (tensor.dtype, tuple(tensor.shape))
    if clash := sorted(layout.keys() & fold.learned.tensors.keys()):
        what = f"the model has a tensor {clash[0]}, where a learned scale would stand"
        raise UsageError(Problem(what, str(fold.source.checkpoint.path), "rename that module"))
    return layout | {name: (t.dtype, tuple(t.shape)) for name, t in fold.learned.tensors.items()}


def _below(key: str, paths: set[str]) -> bool:
    while key:
        key = key.rpartition(".")[0]
        if key in paths:
            return True
    return False


def _stream(fold: Fold, ranges: dict[int, Ranges], progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the artifact under its new name; the folded ones first, a group in memory at a time."""
    keymap, tensors = fold.keymap, fold.source.checkpoint.tensors
    keys = keys_by_module(fold.source)
    written: set[str] = set()
    for number, rewrite in folded(fold, progress):
        ranges[number] = range_of(fold, number, rewrite)
        for key, tensor in rewrite.tensors.items():
            new = keymap(key)
            assert new is not None
            written.add(new)
            yield new, tensor
        # Those of the members are not needed any more.
        for path in fold.decisions[number].members:
            for key in keys.get(path, ()):
                tensors[key].release()
    written_before = next(iter(tensors.values()))
    for key, stored in tensors.items():
        new = keymap(key)
        if new in fold.layout and new not in written:
            assert new is not None
            yield new, stored.load()
            # The one before has been written by now; this one may still be on its way.
            written_before.release()
            written_before = stored
    yield from fold.learned.tensors.items()


def _hints(tree: ModuleTree, decision: Decision) -> dict[str, Any]:
    norm = next((tree[path] for path in decision.members[1:] if kind_of(tree[path]).startswith("norm")), None)
    return hints_of(tree[decision.members[0]], norm)


def keys_by_module(source: Source) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for key in source.checkpoint.tensors:
        path = key
        while path:
            path = path.rpartition(".")[0]
            keys.setdefault(path, []).append(key)
    return keys
