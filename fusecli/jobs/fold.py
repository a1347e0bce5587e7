"""Folding a checkpoint into a file: group by group, each tensor read once and written once.

The structure is planned on the meta device; only the tensors of one group are in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fusecli.algebra.blocks import undivided
from fusecli.checkpoint import in_text, write_pt, write_safetensors
from fusecli.engine import Decision, Group, Plan, alone, baking, compute, owning, plan, refusal
from fusecli.errors import NotFoldable, Problem, UsageError
from fusecli.graph.kinds import kind_of
from fusecli.graph.materialise import with_tensors
from fusecli.graph.record import Run
from fusecli.graph.stand_in import hints_of
from fusecli.jobs.learned import Learned, learned
from fusecli.jobs.source import Source
from fusecli.jobs.weight_ranges import Ranges, weight_range
from fusecli.outcome import GroupReport, LedgerEntry, Refusal, Unfused
from fusecli.rewrite import (
    MANIFEST_KEY,
    GroupRecord,
    KeyMap,
    Manifest,
    ModuleTree,
    Rewrite,
    TrainedRecord,
    apply_edits,
)

_No = TypeVar("_No", Refusal, Unfused)
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Refused(Exception):
    """Some groups cannot be fused, so none is; carries all the refusals."""

    def __init__(self, refused: list[Refusal]) -> None:
        super().__init__(f"{len(refused)} groups refused")
        self.refused = tuple(refused)


@dataclass
class Fold:
    """A planned fold of one source: what will be written, and (after writing) what is known of each group."""

    source: Source
    skeleton: nn.Module
    decisions: tuple[Decision, ...]
    done: tuple[Group, ...]
    rewrites: list[Rewrite]
    kinds_before: list[tuple[str, ...]]
    hints: list[dict[str, Any]]
    modules: dict[str, nn.Module]
    layout: Layout = field(default_factory=dict)
    learned: Learned = field(default_factory=Learned)
    ranges: dict[int, Ranges] = field(default_factory=dict)

    @property
    def members(self) -> list[str]:
        return [path for decision in self.decisions for path in decision.members]

    @property
    def keymap(self) -> KeyMap:
        return KeyMap(edit for rewrite in self.rewrites for edit in rewrite.edits)

    @property
    def folded(self) -> set[str]:
        """Keys of the artifact whose tensors the fold computed."""
        keymap = self.keymap
        return {
            new for rewrite in self.rewrites for key in rewrite.tensors if (new := keymap(key)) is not None
        }

    @property
    def foreign(self) -> set[str]:
        """Those of them that a custom fuser computed."""
        opaque = [r for d, r in zip(self.decisions, self.rewrites, strict=True) if d.custom]
        return {key for rewrite in opaque for key in rewrite.tensors}


def plan_fold(source: Source, skeleton: nn.Module, groups: list[Group], run: Run | None = None) -> Fold:
    """Plans every group on the meta device; raises Refused with all the groups that cannot be fused.

    run  a run of the model that each group is audited against
    """
    try:
        planned, rewrites, refused = _planned(source, skeleton, groups, run)
    except UsageError:
        # A group whose shapes do not fit is why the model does not run.
        planned, rewrites, refused = _planned(source, skeleton, groups, None)
        if not refused:
            raise
    if refused:
        told = [still_computed(no, source.unbakeable) for no in refused]
        raise Refused(_in_order(told, groups))
    tree = ModuleTree(skeleton)
    fold = Fold(
        source=source,
        skeleton=skeleton,
        decisions=planned.decisions,
        done=planned.done,
        rewrites=rewrites,
        kinds_before=[_kinds(tree, decision.group.modules) for decision in planned.decisions],
        hints=[_hints(tree, decision) for decision in planned.decisions],
        # Copies: the proof wants the members as they were, and the skeleton is edited before it.
        modules={
            path: with_tensors(tree[path], lambda _, old: old)
            for decision in planned.decisions
            for path in decision.members
        },
    )
    trained = {path for d in planned.decisions for path in d.members} if source.trained else set()
    fold.learned = learned(
        source, planned.decisions, {path: source.member(path, tree[path]) for path in trained}
    )
    fold.layout = _layout(fold)
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
    source: Source, skeleton: nn.Module, groups: list[Group], run: Run | None
) -> tuple[Plan, list[Rewrite], list[Refusal]]:
    tree = ModuleTree(skeleton)
    baked = [group for group in groups if len(group.modules) == 1 and group.modules[0] in source.bakes]
    planned = plan(tree, [group for group in groups if group not in baked], source.vocabulary, run)
    refused = list(planned.refused)
    decisions = list(planned.decisions)
    for group in baked:
        try:
            decisions.append(alone(tree, group, source.bakes, source.vocabulary, run))
        except NotFoldable as no:
            refused.append(refusal(group, no))
    prepared = (owning(baking(decision, source.bakes), source.owns) for decision in decisions)
    planned = replace(planned, decisions=tuple(prepared))
    rewrites: list[Rewrite] = []
    for decision in planned.decisions:
        try:
            rewrites.append(decision.rewrite(_modules(source, tree, decision, real=decision.custom)))
        except NotFoldable as no:
            refused.append(refusal(decision.group, no, decision.rule))
    return planned, rewrites, refused


def try_fold(fold: Fold) -> None:
    """Folds and forgets; raises Refused where a group's numbers forbid it, as write_fold would."""
    for _ in _folded(fold, lambda _: None, {}):
        pass


def write_fold(
    fold: Fold, path: Path, fmt: str, manifest: Callable[[str], Manifest], tick: Callable[[str], None]
) -> None:
    """Folds and writes; raises Refused where a group's numbers forbid it (statistics, overflow, a probe).

    `manifest` makes the manifest from the input's sha256, which is taken while the tensors are written.
    """
    with fold.source.checkpoint.hashing() as digest, undivided():
        tensors = _stream(fold, tick)

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


def extra_state(fold: Fold) -> dict[str, object]:
    """What the checkpoint holds beside its tensors, by its names in the artifact."""
    keymap = fold.keymap
    named = ((keymap(key), value) for key, value in fold.source.checkpoint.others.items())
    return {name: value for name, value in named if name is not None}


def apply_to_skeleton(fold: Fold) -> list[LedgerEntry]:
    """Makes the skeleton the fused one; returns what was lost."""
    tree = ModuleTree(fold.skeleton)
    return [entry for rewrite in fold.rewrites for entry in apply_edits(tree, rewrite.edits)]


def manifest_for(fold: Fold, input_sha256: str, **facts: Any) -> Manifest:
    checkpoint = fold.source.checkpoint
    groups = tuple(
        GroupRecord(decision.group.modules, decision.rule, decision.evidence, decision.kept, hints)
        for decision, hints in zip(fold.decisions, fold.hints, strict=True)
    )
    return Manifest(
        fold.source.vocabulary.mode,
        groups,
        tuple(edit for rewrite in fold.rewrites for edit in rewrite.edits),
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


def group_reports(fold: Fold, fused: nn.Module) -> list[GroupReport]:
    """The structural facts of every group; the verifier adds the numbers."""
    keymap, keys = fold.keymap, _keys_by_module(fold.source)
    after = dict(fused.named_modules(remove_duplicate=False))
    reports = []
    for number, decision in enumerate(fold.decisions):
        own = [key for path in decision.members for key in keys.get(path, ())]
        rewritten = fold.rewrites[number].tensors
        moved = [(key, keymap(key)) for key in own]
        before, then = fold.ranges.get(number, (None, None))
        reports.append(
            GroupReport(
                modules=decision.group.modules,
                rule=decision.rule,
                status="planned",
                evidence=decision.evidence,
                kinds_before=fold.kinds_before[number],
                kinds_after=tuple(type(after[path]).__name__ for path in decision.group.modules),
                weight_range_before=before,
                weight_range_after=then,
                keys_removed=tuple(old for old, new in moved if new is None),
                keys_renamed=tuple((old, new) for old, new in moved if new is not None and new != old),
                keys_added=tuple(
                    new for key in rewritten if key not in own and (new := keymap(key)) is not None
                ),
                kept=decision.kept,
                notes=(
                    *(f"{' + '.join(no.group)} stays: {no.reason}" for no in decision.spared),
                    *(decision.caveats),
                ),
            )
        )
    return reports


def _layout(fold: Fold) -> Layout:
    """Every tensor of the artifact with its dtype and shape."""
    keymap = fold.keymap
    rewritten = {key: tensor for rewrite in fold.rewrites for key, tensor in rewrite.tensors.items()}
    opaque = {edit for d in fold.decisions if d.custom for edit in d.members}
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


def _stream(fold: Fold, tick: Callable[[str], None]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the artifact under its new name; the folded ones first, a group in memory at a time."""
    keymap, tensors = fold.keymap, fold.source.checkpoint.tensors
    written: set[str] = set()
    for name, tensor in _folded(fold, tick, _keys_by_module(fold.source)):
        written.add(name)
        yield name, tensor
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


def _folded(
    fold: Fold, tick: Callable[[str], None], keys: Mapping[str, list[str]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that the groups compute; `keys` are those of each module, which are not needed any more
    once its group is folded. Raises Refused after the last group if some cannot be fused."""
    keymap, tensors = fold.keymap, fold.source.checkpoint.tensors
    refused: list[Refusal] = []
    tree = ModuleTree(fold.skeleton)
    for number, decision in enumerate(fold.decisions):
        tick(f"folding group {number + 1} of {len(fold.decisions)}")
        try:
            rewrite = fold.rewrites[number]
            if not decision.custom:
                modules = _modules(fold.source, tree, decision, real=True)
                rewrite = compute(decision, modules)
                fold.ranges[number] = weight_range(modules[decision.members[0]], rewrite, decision.members[0])
        except NotFoldable as no:
            refused.append(refusal(decision.group, no, decision.rule))
            continue
        for key, tensor in rewrite.tensors.items():
            new = keymap(key)
            assert new is not None
            yield new, tensor
        for key in (key for path in decision.members for key in keys.get(path, ())):
            tensors[key].release()
    if refused:
        raise Refused(refused)


def _modules(source: Source, tree: ModuleTree, decision: Decision, *, real: bool) -> Mapping[str, nn.Module]:
    found = {path: tree[path] for path in decision.members}
    return {path: source.member(path, module) for path, module in found.items()} if real else found


def _hints(tree: ModuleTree, decision: Decision) -> dict[str, Any]:
    norm = next((tree[path] for path in decision.members[1:] if kind_of(tree[path]).startswith("norm")), None)
    return hints_of(tree[decision.members[0]], norm)


def _kinds(tree: ModuleTree, paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(type(tree[path]).__name__ for path in paths)


def _in_order(refused: list[Refusal], groups: list[Group]) -> list[Refusal]:
    position = {group.modules: number for number, group in enumerate(groups)}
    return sorted(refused, key=lambda refusal: position[refusal.group])


def _keys_by_module(source: Source) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for key in source.checkpoint.tensors:
        path = key
        while path:
            path = path.rpartition(".")[0]
            keys.setdefault(path, []).append(key)
    return keys
