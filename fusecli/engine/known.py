"""What every search for folds starts from: the maps of a run, and where its layers apply their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from fusecli.engine.audit import Audit
from fusecli.engine.branches import Addends, addends
from fusecli.engine.decisions import Member
from fusecli.engine.inside import applied_as_is, layer_at_work
from fusecli.engine.maps import Map, norm_map
from fusecli.engine.scales import has_literals, scales_and_gains
from fusecli.engine.sizes import holds_for_other_sizes
from fusecli.engine.uses import Uses
from fusecli.errors import NotFoldable, require
from fusecli.graph.kinds import NORM_KINDS, without_statistics
from fusecli.graph.lift import linear_op
from fusecli.graph.sites import Site


@dataclass
class Known:
    """Worked out once for one run, when somebody asks for it. `refused`: the norms that are no maps."""

    audit: Audit
    uses: Uses
    _layers: dict[str, list[Site] | NotFoldable] = field(default_factory=dict, repr=False)

    @property
    def maps(self) -> Sequence[Map]:
        """The maps of the run, the last one first."""
        return self._found[0]

    @property
    def refused(self) -> dict[str, NotFoldable]:
        return self._found[1]

    @cached_property
    def _found(self) -> tuple[list[Map], dict[str, NotFoldable]]:
        recording = self.audit.recording
        found: list[Map] = []
        refused: dict[str, NotFoldable] = {}
        for path in recording.names:
            member = self.audit.member(path) if path else None
            if member is None or member.kind not in NORM_KINDS:
                continue
            try:
                scripted = isinstance(member.module, torch.jit.ScriptModule)
                require(not scripted, "scripted", f"{path} is a scripted module, which cannot be replaced")
                missing = without_statistics(member.module)
                require(missing is None, *(missing or ("no-statistics", "")))
                self.uses.require_single(path, member.module)
                found.append(norm_map(recording, member, self.audit.norm_sites(member)))
            except NotFoldable as no:
                refused[path] = no
        for scale in scales_and_gains(recording, self.audit.member):
            try:
                self.uses.require_single(scale.path, scale.member.module)
                require(
                    not has_literals(scale) or holds_for_other_sizes(recording, scale),
                    "not-affine",
                    f"{scale.path} scales by a number that may depend on its input",
                )
                found.append(scale)
            except NotFoldable as no:
                refused[scale.path] = no
        return sorted(found, key=lambda found: found.last, reverse=True), refused

    @cached_property
    def addends(self) -> tuple[Addends, ...]:
        return tuple(addends(self.audit.recording))

    def layer_sites(self, layer: Member) -> Sequence[Site]:
        """Where a layer applies its weight; raises NotFoldable where it cannot be changed."""
        known = self._layers.get(layer.path)
        if known is None:
            try:
                self.uses.require_single(layer.path, layer.module)
                linear_op(layer.module, transposed=layer.kind == "conv_transpose")
                known = layer_at_work(self.audit.run, layer, self.audit.unbiased)
            except NotFoldable as no:
                known = no
            self._layers[layer.path] = known
        if isinstance(known, NotFoldable):
            raise known
        return known

    @property
    def shown(self) -> frozenset[str]:
        """The layers that apply their stored weight and bias as they are, whatever their class is."""
        sites = {path: found for path, found in self._layers.items() if not isinstance(found, NotFoldable)}
        recording = self.audit.recording
        return frozenset(p for p, found in sites.items() if applied_as_is(recording, p, found))
