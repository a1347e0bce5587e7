"""Are the channels that a norm normalises the output channels of the layer before it? Labels tell."""

from __future__ import annotations

from collections.abc import Sequence

from fusecli.engine.decisions import Member
from fusecli.errors import NotFoldable, require
from fusecli.graph.dataflow import Recording
from fusecli.graph.labels import CONFLICT, labels_at
from fusecli.graph.ops import NORMS
from fusecli.graph.sites import Site, channel_seeds, flowing


def same_channels(
    recording: Recording, layer: Member, sites: Sequence[Site], norm: Member, reached: Sequence[Site]
) -> None:
    """Labels on the layer's output channels have to meet the same labels on the norm's vectors."""
    vectors = _shapes(norm) | {f"{layer.path}.bias": shape for shape in _bias_shape(layer)}
    for site, target in zip(sites, reached, strict=True):
        shape = recording.values[site.exit or 0].shape
        if 0 in shape:
            continue  # an empty batch shows nothing, which the proof will say
        visit = recording.visits_of(norm.path)[target.visit]
        inside = flowing(recording, visit)
        last = next((call for call in reversed(inside) if call.name in NORMS), inside[-1])
        seeds = channel_seeds(recording, site, vectors)
        try:
            labels = labels_at(recording, last.makes[0], seeds)
        except LookupError as op:
            raise NotFoldable(
                "bn-axis", f"the channels of {layer.path} cannot be followed to {norm.path}: {op}"
            ) from None
        require(
            labels is not None and not bool((labels == CONFLICT).any()),
            "bn-axis",
            f"the channels that {norm.path} normalises are not the output channels of {layer.path}",
            evidence=(
                f"{layer.path} gives {_given(recording, layer, site)}, {norm.path} takes "
                f"{list(recording.values[target.entry or 0].shape)} and normalises axis 1",
            ),
            remedy="leave the group out: this norm is no function of the layer's output channels",
        )


def _given(recording: Recording, layer: Member, site: Site) -> list[int]:
    gives = recording.visits_of(layer.path)[site.visit].gives
    return list(recording.values[gives[0] if gives else site.exit or 0].shape)


def _shapes(norm: Member) -> dict[str, tuple[int, ...]]:
    tensors = {**norm.module._parameters, **norm.module._buffers}
    return {f"{norm.path}.{name}": tuple(t.shape) for name, t in tensors.items() if t is not None}


def _bias_shape(layer: Member) -> list[tuple[int, ...]]:
    bias = layer.module._parameters.get("bias")
    return [] if bias is None else [tuple(bias.shape)]
