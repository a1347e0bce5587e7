"""What is judged: an original, its fold, and what is known of how one became the other."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import chain

from torch import Tensor, nn

from fusecli.equivalence.groups import Passes
from fusecli.equivalence.regions import Region
from fusecli.equivalence.trail import End
from fusecli.graph.materialise import duplicate


@dataclass(frozen=True)
class Subject:
    """Models in eval mode that share nothing.

    original, fused   in the stored dtype; `fused` is what a user would load
    exact             the original in float64 with the same fold, not rounded
    groups            the members of every group, by path
    passes            for each group, the calls that belong together (see equivalence.groups.observed)
    regions           for each group that is no chain, the part of the recorded run that it is
    folded, foreign   state-dict keys of the fold, and of them those a custom fuser computed
    names             where it is to be trained: the name in `fused` of a tensor of `original`
    partly_fused      builds `exact` with the first n groups only, to find the one that breaks the whole
    """

    original: nn.Module
    fused: nn.Module
    exact: nn.Module
    groups: tuple[tuple[str, ...], ...]
    passes: tuple[Passes, ...]
    folded: Collection[str] = ()
    foreign: Collection[str] = ()
    regions: tuple[Region | None, ...] = ()
    partly_fused: Callable[[int], nn.Module] | None = None
    names: Callable[[str], str | None] | None = None

    @property
    def shapes(self) -> tuple[Region | None, ...]:
        """`regions`, one for each group."""
        return self.regions or (None,) * len(self.groups)

    @property
    def spans(self) -> tuple[tuple[End, End], ...]:
        """For each group the module whose call begins it and the one whose return ends it."""
        return tuple(
            (End(group[0]), End(group[-1]))
            if region is None
            else (End(*region.begins_in), End(*region.ends_in))
            for group, region in zip(self.groups, self.shapes, strict=True)
        )

    @property
    def exits(self) -> tuple[End, ...]:
        """The calls that return what is read outside of the groups."""
        return tuple(
            end
            for group, region in zip(self.groups, self.shapes, strict=True)
            for end in ([End(group[-1])] if region is None else [End(*call) for call in region.leaves_in])
        )


def with_exact_tensors(subject: Subject) -> nn.Module:
    """The fused model itself in float64, with the fold's exact tensors.

    So its own structure, attributes and code are run; its stored tensors are held against the exact ones.
    """
    exact = _tensors(subject.exact)
    instead = {
        id(tensor): exact[name]
        for name, tensor in _tensors(subject.fused).items()
        if name in exact and exact[name].shape == tensor.shape
    }
    return duplicate(subject.fused, instead).double()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer that the state dict holds, under all its names."""
    kept = model.state_dict(keep_vars=True).keys()
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in named if name in kept}
