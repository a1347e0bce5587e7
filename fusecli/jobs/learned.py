"""Scales and zero points that quantization-aware training has learned, as they are after the fold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fusecli.engine import Decision
from fusecli.graph.lift import channel_affine
from fusecli.jobs.source import Source
from fusecli.jobs.trained import Trained
from fusecli.outcome import LedgerEntry
from fusecli.rewrite import QuantizerRecord


@dataclass(frozen=True)
class Learned:
    """The scales and zero points that an artifact holds: tensors by name, what they are, what was lost."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    records: tuple[QuantizerRecord, ...] = ()
    ledger: tuple[LedgerEntry, ...] = ()


def learned(source: Source, decisions: Sequence[Decision], modules: Mapping[str, nn.Module]) -> Learned:
    """What was learned, as it is after the fold; `modules` are the members, by path, with their tensors.

    A scale learned for s W, as QAT modules do, is that of the folded weight. One learned for W belongs to a
    weight that the fold multiplies by s, per channel: it is multiplied by |s|.
    """
    trained = source.trained
    if trained is None:
        return Learned()
    outside = {d.members[0]: d.members[1] for d in decisions if d.members[0] not in trained.norms}
    found = dict(_after(trained, outside))
    tensors: dict[str, Tensor] = {}
    records: list[QuantizerRecord] = []
    ledger: list[LedgerEntry] = []
    if source.build is None:
        said = "the model's name of the norm inside is not known, and load_fused needs it: list it in groups"
        nameless = (layer for layer, norm in trained.norms.items() if norm == f"{layer}.bn")
        ledger += (LedgerEntry("assumed", layer, said) for layer in nameless)
    for what, (scale, zero_point) in trained.scales.items():
        if what not in found:
            ledger.append(LedgerEntry("quantizer", what, "its scale is gone: the fold makes another tensor"))
            continue
        name, layer = found[what], what.removesuffix(".weight")
        pair = scale.load().clone(), zero_point.load().clone()
        rescaled = layer != what and layer in outside and what not in trained.folded
        if rescaled:
            factor = channel_affine(modules[outside[layer]]).scale
            if bool((factor < 0).any()) and bool(pair[1].any()):
                said = "its scale is gone: a negative gamma turns the weight around its zero point"
                ledger.append(LedgerEntry("quantizer", what, said))
                continue
            pair = _rescaled(*pair, factor)
        tensors |= {f"{name}.scale": pair[0], f"{name}.zero_point": pair[1]}
        records.append(QuantizerRecord(name, rescaled))
    return Learned(tensors, tuple(records), tuple(ledger))


def _after(trained: Trained, outside: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What is quantized, and its name once each norm of `outside` is folded into its layer."""
    layers = {norm: layer for layer, norm in outside.items()}
    for what in trained.scales:
        path, _, kind = what.rpartition(".")
        if kind != "output":
            yield what, what
        elif path in layers:
            yield what, f"{layers[path]}.output"
        elif path not in outside:
            yield what, what


def _rescaled(scale: Tensor, zero_point: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    wide = scale.double() * factor.abs()
    return wide.to(scale.dtype), torch.broadcast_to(zero_point, wide.shape).clone()
