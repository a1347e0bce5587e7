"""Where torch fills rows with zeros that no recorded run shows: the fast path of nn.TransformerEncoder.

With a padding mask, in eval mode, without gradients and without modes, it runs its layers on nested tensors
and gives zeros where they have no rows. A recorder is a mode: it only ever sees the slow path.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fusecli.graph.dataflow import Recording


def padded_values(recording: Recording, modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """The values that other inputs may find padded with zeros, and the module that pads them."""
    return {
        value: path
        for path, module in modules.items()
        if may_pad(module)
        for visit in recording.visits_of(path)
        for value in visit.gives
    }


def may_pad(module: nn.Module) -> bool:
    """Whether the last thing that the module does, given a padding mask, is to fill rows with zeros. A norm
    of its own comes behind that."""
    return (
        isinstance(module, nn.TransformerEncoder)
        and type(module).forward is nn.TransformerEncoder.forward
        and module.norm is None
        and bool(getattr(module, "use_nested_tensor", module.enable_nested_tensor))
    )
