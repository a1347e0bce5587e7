"""Scales and zero points that quantization-aware training has learned, as they are after the fold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fusecli.engine import Decision, rules_in
from fusecli.graph.lift import channel_affine
from fusecli.outcome import LedgerEntry
from fusecli.rewrite import QuantizerRecord
from fusecli.source.learned_scales import Trained
from fusecli.source.source import Source


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
    folds = {d.members[0]: d for d in decisions if len(d.members) > 1 and not d.custom}
    outside = {layer: d.members[1] for layer, d in folds.items() if layer not in trained.norms}
    gone = _lost(trained, folds, [path for d in decisions if d.custom for path in d.members])
    found = dict(_after(trained, outside, folds))
    tensors: dict[str, Tensor] = {}
    records: list[QuantizerRecord] = []
    ledger: list[LedgerEntry] = []
    if source.build is None:
        said = "the model's name of the norm inside is not known, and load_fused needs it: list it in groups"
        nameless = (layer for layer, norm in trained.norms.items() if norm == f"{layer}.bn")
        ledger += (LedgerEntry("assumed", layer, said) for layer in nameless)
    for what, stored in trained.scales.items():
        learned_for = stored.read(weight=what.endswith(".weight"))
        if isinstance(learned_for, str):
            said = f"its scale is not used: {learned_for}; calibration gives one"
            ledger.append(LedgerEntry("quantizer", what, said))
            continue
        if what in gone:
            ledger.append(LedgerEntry("quantizer", what, f"its scale is gone: {gone[what]}"))
            continue
        if what not in found:
            ledger.append(LedgerEntry("quantizer", what, "its scale is gone: the fold makes another tensor"))
            continue
        name, layer = found[what], what.removesuffix(".weight")
        pair = learned_for.scale, learned_for.zero_point
        rescaled = layer != what and layer in outside and what not in trained.folded
        if rescaled:
            factor = channel_affine(modules[outside[layer]]).scale
            transposed = "conv_transpose_bn" in rules_in(folds[layer].rule)
            if why := _no_scale(*pair, factor, transposed=transposed):
                ledger.append(LedgerEntry("quantizer", what, f"its scale is gone: {why}"))
                continue
            pair = _rescaled(*pair, factor)
        tensors |= {f"{name}.scale": pair[0], f"{name}.zero_point": pair[1]}
        records.append(QuantizerRecord(name, rescaled, learned_for.integers))
    return Learned(tensors, tuple(records), tuple(ledger))


def _lost(trained: Trained, folds: Collection[str], custom: Collection[str]) -> dict[str, str]:
    """What has no scale any more, whatever its numbers are, and why."""
    lost = {}
    for what in trained.scales:
        path = what.rpartition(".")[0]
        if path in custom:
            lost[what] = "what a custom fuser makes is not known"
        elif what in trained.folded and path not in folds:
            lost[what] = "it was learned for the weight with its norm folded in, and the norm stays"
    return lost


def _after(trained: Trained, outside: Mapping[str, str], folds: Collection[str]) -> Iterator[tuple[str, str]]:
    """What is quantized, and its name once each norm of `outside` is folded into its layer, and each norm
    inside a layer that is none of `folds` stands behind it."""
    layers = {norm: layer for layer, norm in outside.items()}
    for what in trained.scales:
        path, _, kind = what.rpartition(".")
        if kind != "output":
            yield what, what
        elif path in trained.norms and path not in folds:
            yield what, f"{trained.norms[path]}.output"
        elif path in layers:
            yield what, f"{layers[path]}.output"
        elif path not in outside:
            yield what, what


def _no_scale(scale: Tensor, zero_point: Tensor, factor: Tensor, *, transposed: bool) -> str:
    """Why the folded weight has no such scale; empty if it has."""
    if bool((factor < 0).any()) and bool(zero_point.any()):
        return "a negative gamma turns the weight around its zero point"
    if transposed:
        return "the outputs of a transposed convolution are no channels of its weight's first axis"
    fits = all(tensor.numel() == 1 or tensor.shape == factor.shape for tensor in (scale, zero_point))
    if not fits or not scale.is_floating_point():
        return f"of {list(scale.shape)} it is neither one for the weight nor one for each channel"
    return ""


def _rescaled(scale: Tensor, zero_point: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """A channel that is 0 now can have any scale but 0, so it keeps its own."""
    wide = scale.double().flatten() * factor.abs()
    wide = torch.where(wide == 0, scale.double().flatten(), wide)
    return wide.to(scale.dtype), torch.broadcast_to(zero_point.flatten(), wide.shape).clone()
