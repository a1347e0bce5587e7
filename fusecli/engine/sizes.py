"""Is a map the same for inputs of other sizes? A number in forward may have come from one.

y * g / y.shape[-1] is recorded as y * g / 5: what the op is given does not tell where it is from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusecli.algebra import ChannelAffine
from fusecli.engine.maps import Map
from fusecli.graph.dataflow import Recording
from fusecli.graph.materialise import with_tensors
from fusecli.proof.run import float64_arithmetic


def holds_for_other_sizes(recording: Recording, found: Map) -> bool:
    """Whether a scale or a gain is the same map for inputs of other sizes: its module is run by itself on
    random numbers, with random tensors, once as it is and once without it.

    False also where the module does not run by itself on one tensor.
    """
    visits = recording.visits_of(found.path)
    shapes = {recording.values[visit.takes[0]].shape for visit in visits if visit.plain}
    if len(visits) != sum(visit.plain for visit in visits) or not shapes:
        return False
    generator = torch.Generator().manual_seed(0)

    def drawn(_: str, old: Tensor) -> Tensor:
        if not old.is_floating_point():
            return torch.zeros(old.shape, dtype=old.dtype)
        return torch.rand(old.shape, generator=generator, dtype=torch.float64) + 0.5

    module = with_tensors(found.member.module, drawn).eval()
    try:
        affine = found.affine(module)
        for more in (1, 2):
            for shape in shapes:
                axis = found.axis % len(shape)
                sizes = [size if at == axis else size + more for at, size in enumerate(shape)]
                x = torch.randn(sizes, generator=generator, dtype=torch.float64)
                if not _is_the_map(found, module, affine, x, axis):
                    return False
    except Exception:  # whatever somebody's forward may raise
        return False
    return True


def _is_the_map(found: Map, module: nn.Module, affine: ChannelAffine, x: Tensor, axis: int) -> bool:
    with torch.no_grad(), float64_arithmetic():
        given: Tensor = module(x.clone())
        before = x
        if found.member.kind == "gain":
            plain = with_tensors(module, lambda _, old: old)
            for name, tensor in found.neutral(module).items():
                held: dict[str, Any] = plain._buffers if name in plain._buffers else plain._parameters
                held[name] = tensor
            before = plain(x.clone())
        expected = affine(before.movedim(axis, 1)).movedim(1, axis)
    return given.shape == expected.shape and bool(torch.allclose(given, expected, rtol=1e-9, atol=1e-12))
