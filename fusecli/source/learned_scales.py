"""What quantization-aware training leaves beside a float checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusecli.checkpoint import StoredTensor
from fusecli.qat.qparams import QParams, integers_of, too_wide, unobserved


@dataclass(frozen=True)
class StoredScale:
    """A fake quantizer's scale and zero point, and the lowest and the highest value that made them."""

    scale: StoredTensor
    zero_point: StoredTensor
    seen: tuple[StoredTensor, StoredTensor] | None = None

    def read(self, *, weight: bool) -> QParams | str:
        """The numbers, with the integers they are meant for; or why they are no scale of anything."""
        scale, zero_point = self.scale.load().clone(), self.zero_point.load().clone()
        low, high = (stored.load() for stored in self.seen) if self.seen else (None, None)
        if why := unobserved(scale, low, high) or too_wide(scale, zero_point, low, high):
            return why
        return QParams(scale, zero_point, integers_of(scale, zero_point, low, high, weight=weight))


@dataclass(frozen=True)
class Trained:
    """What there is besides a float checkpoint.

    layout   "fused" or "prepared", as checkpoint.qat_layout has them
    norms    for each layer with a norm inside the name of that norm in the model
    scales   what fake quantizers have learned, by what they quantize: "conv.weight", "conv.output"
    folded   those of them that were learned for the folded weight
    hints    what is known of the norms' groups and no tensor tells
    """

    layout: str
    norms: Mapping[str, str]
    scales: Mapping[str, StoredScale] = field(default_factory=dict)
    folded: frozenset[str] = frozenset()
    hints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
