"""Per-channel affine maps in a run: norms, modules that only scale and shift, and gains inside of others.

A map is what the fold moves. A norm and a scale are modules that do nothing else and become identities; a
gain is the part of a module (LayerNorm, RMSNorm, a block with a LayerScale of its own) that is one: the
module stays, its gain becomes neutral.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from fusecli.algebra import ChannelAffine
from fusecli.engine.affine_ops import adds_shift, evaluated
from fusecli.engine.decisions import Member
from fusecli.errors import NotFoldable, require
from fusecli.graph.dataflow import Call, Recording
from fusecli.graph.kinds import NORM_KINDS, is_exact
from fusecli.graph.labels import along, labels_at
from fusecli.graph.lift import channel_affine
from fusecli.graph.replay import Replay
from fusecli.graph.sites import Site, flowing


@dataclass(frozen=True)
class Map:
    """One affine map and everywhere it is applied.

    sites    for each call of the module where it is: what comes in (None: no tensor does) and what goes out
    axis     the channel axis of both, counted from the end for a gain, from the front for a norm
    chains   the ops of each site, for a scale and a gain
    """

    member: Member
    sites: tuple[Site, ...]
    axis: int
    chains: tuple[tuple[Call, ...], ...] = ()
    recording: Recording | None = None

    @property
    def path(self) -> str:
        return self.member.path

    @property
    def calls(self) -> frozenset[int]:
        """The ops of a scale or a gain."""
        return frozenset(call.number for chain in self.chains for call in chain)

    @property
    def last(self) -> int:
        """When it is applied for the last time."""
        return max(site.exit or 0 for site in self.sites)

    @property
    def origins(self) -> tuple[str, ...]:
        """The tensors, by their name in the module, that a scale or a gain is made of."""
        assert self.recording is not None
        values = self.recording.values
        names = {
            o for call in self.chains[0] for v in call.reads if values[v].constant for o in values[v].origins
        }
        return tuple(sorted(name.rpartition(".")[2] for name in names))

    def affine(self, module: nn.Module) -> ChannelAffine:
        """Its value, with the tensors of `module`."""
        if self.member.kind in NORM_KINDS:
            return channel_affine(module)
        return self._value(lambda name: _held(module, name))

    def neutral(self, module: nn.Module) -> dict[str, Tensor]:
        """Tensors, by their name in the module, with which a gain does nothing."""
        held = {name: _held(module, name) for name in self.origins}
        for choice in product((1.0, 0.0), repeat=len(held)):
            filled = {
                n: torch.full(t.shape, v, dtype=torch.float64)
                for (n, t), v in zip(held.items(), choice, strict=True)
            }
            value = self._value(filled.__getitem__)
            if bool((value.scale == 1).all()) and not bool(value.shift.any()):
                return {n: t.new_full(t.shape, v) for (n, t), v in zip(held.items(), choice, strict=True)}
        raise NotFoldable(
            "not-affine", f"no values of {', '.join(held)} make the gain of {self.path} neutral"
        )

    def _value(self, held: Callable[[str], Tensor]) -> ChannelAffine:
        assert self.recording is not None
        exit = self.sites[0].exit
        assert exit is not None
        shape = self.recording.values[exit].shape
        shifts = any(adds_shift(call) for call in self.chains[0])
        if any(held(name).is_meta for name in self.origins):
            unknown = torch.empty(shape[self.axis], dtype=torch.float64, device="meta")
            return ChannelAffine(unknown, unknown, shifts)
        constants = Replay(self.recording, lambda name: held(name.rpartition(".")[2]).double())
        scale, shift = evaluated(self.chains[0], constants)
        return ChannelAffine(_vector(scale, shape, self.axis), _vector(shift, shape, self.axis), shifts)


def _held(module: nn.Module, name: str) -> Tensor:
    parameter = module._parameters.get(name)
    tensor = module._buffers.get(name) if parameter is None else parameter
    require(tensor is not None, "not-affine", f"{name} is neither a parameter nor a buffer")
    assert tensor is not None
    return tensor.detach()


def norm_map(recording: Recording, member: Member, sites: Sequence[Site]) -> Map:
    """The map that a norm module is; raises NotFoldable where it is none."""
    axes = {1} if is_exact(member.module) else {_norm_axis(recording, member, site) for site in sites}
    require(len(axes) == 1, "bn-axis", f"{member.path} normalises different axes")
    return Map(member, tuple(sites), axes.pop())


def _norm_axis(recording: Recording, member: Member, site: Site) -> int:
    """The axis along which a norm of an unknown class has its channels: there labels on what comes in meet
    those on its vectors."""
    assert site.entry is not None
    shape = recording.values[site.entry].shape
    last = flowing(recording, recording.visits_of(member.path)[site.visit])[-1]
    vectors = [value for value in recording.tensors_of(member.path) if len(value.shape) == 1]
    for axis in range(1, len(shape)):
        if any(value.shape != (shape[axis],) for value in vectors):
            continue
        seeds = {value.number: along(value.shape, 0) for value in vectors}
        try:
            labels = labels_at(recording, last.makes[0], {**seeds, site.entry: along(shape, axis)})
        except LookupError as op:
            raise NotFoldable("bn-axis", f"channels cannot be followed through {member.path}: {op}") from None
        given = recording.values[last.makes[0]].shape
        if labels is not None and given == shape and torch.equal(labels, along(shape, axis)):
            return axis
    raise NotFoldable("bn-axis", f"the channels of {member.path} are on no axis of what comes in")


def _vector(tensor: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The entries along `axis` of a tensor that is broadcast to `shape`, as float64."""
    line = tensor.double().reshape(-1)
    return line.expand(shape[axis]).clone() if line.numel() == 1 else line.clone()
