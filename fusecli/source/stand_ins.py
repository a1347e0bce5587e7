"""Without the model's code: stand-ins made of the shapes of tensors, and the names that only tensors tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fusecli.checkpoint import Checkpoint
from fusecli.engine import Group
from fusecli.errors import Problem, UsageError
from fusecli.graph.stand_in import Hints, Unknown, rank_of, stand_in
from fusecli.outcome import LedgerEntry
from fusecli.rewrite import stand_in_model
from fusecli.source.adapter import attach_adapter, require_known
from fusecli.source.source import Source, Structure, plain


def stand_ins(
    source: Source,
    groups: Iterable[Group],
    assume: Mapping[str, object],
    known: Mapping[str, nn.Module] | None = None,
) -> tuple[Source, Structure]:
    """A model of stand-ins, one for each member of `groups`, the adapter's layers made plain; and the source
    with what had to be assumed.

    `known` are members without tensors that are known all the same.
    Raises UsageError with everything that the spec has to say more.
    """
    model, assumed = _model(source.checkpoint, groups, assume, known or {})
    source = replace(source, ledger=(*assumed, *source.ledger))
    if source.adapter is not None:
        tied = {name for names in source.checkpoint.ties for name in names}
        attach_adapter(model, source.adapter, tied=tied)
        source = replace(source, bakes=dict.fromkeys(source.adapter.pairs, "lora"))
    return source, plain(model, source.bakes)


def _model(
    checkpoint: Checkpoint,
    groups: Iterable[Group],
    assume: Mapping[str, object],
    known: Mapping[str, nn.Module],
) -> tuple[nn.Module, list[LedgerEntry]]:
    local = _by_module(checkpoint)
    modules: dict[str, nn.Module] = {}
    ledger: list[LedgerEntry] = []
    problems: list[Problem] = []
    for group in groups:
        told: dict[str, Any] = {key: group.hints.get(key) for key in ("kind", "groups", "stride", "eps")}
        hints = Hints(
            **told,
            transposed=assume.get("transposed"),  # type: ignore[arg-type]  # the spec's own types
            assumed_eps=assume.get("eps"),  # type: ignore[arg-type]
            where=group.where,
        )
        rank = rank_of(local.get(group.modules[0], {}))
        for path in group.modules:
            try:
                if path in local:
                    modules[path] = stand_in(path, local[path], hints, rank)
                else:
                    modules[path] = known.get(path) or Unknown()
            except UsageError as error:
                problems += error.problems
        ledger += (LedgerEntry("assumed", path, what) for path, what in hints.assumed)
    if problems:
        raise UsageError(*problems)
    return stand_in_model(modules), ledger


def _by_module(checkpoint: Checkpoint) -> dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    local: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {}
    for name, tensor in checkpoint.tensors.items():
        path, _, attribute = name.rpartition(".")
        local.setdefault(path, {})[attribute] = (tensor.shape, tensor.dtype)
    return local


def adapted_groups(source: Source, groups: Sequence[Group]) -> list[Group]:
    """The layers of the adapter that no group has, where nobody has the model's code; raises UsageError for
    those that the file has not."""
    if source.adapter is None:
        return []
    require_known(source.adapter, module_names(source.checkpoint))
    held = {path for group in groups for path in group.modules}
    return [Group((path,)) for path in source.adapter.pairs if path not in held]


def module_names(checkpoint: Checkpoint) -> list[str]:
    """The modules that hold tensors, in the order of the file."""
    return [path for path in _by_module(checkpoint) if path]
