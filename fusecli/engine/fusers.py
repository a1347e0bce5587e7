"""Custom fusers: calling somebody's function, and a rewrite of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from fusecli.blame import described_with_place
from fusecli.engine.decisions import CustomFuser, Modules
from fusecli.errors import NotFoldable, require
from fusecli.graph.materialise import with_tensors
from fusecli.outcome import Mode
from fusecli.proof.probe import changed_shape
from fusecli.rewrite import Opaque, Rewrite


def opaque(custom: CustomFuser, members: tuple[str, ...], mode: Mode) -> Callable[[Modules], Rewrite]:
    def rewrite(modules: Modules) -> Rewrite:
        # The fuser works on copies: it may change its arguments, and another group may still be refused.
        copies = [with_tensors(modules[path], lambda _, old: old.clone()) for path in members]
        result = call_fuser(custom, copies, mode)
        wrong = changed_shape([modules[path] for path in members], result)
        require(not wrong, "fuser-error", f"what fuser {custom.name} returned {wrong}")
        tensors = {f"{members[0]}.{name}": tensor for name, tensor in result.state_dict().items()}
        return Rewrite(tensors, (Opaque(members[0], members, custom.name, result),))

    return rewrite


def call_fuser(custom: CustomFuser, modules: Sequence[nn.Module], mode: Mode) -> nn.Module:
    """What a custom fuser returns; its mistakes are refusals that carry its name."""
    try:
        result = custom.function(mode == "qat", *modules)
    except Exception as error:  # whatever somebody's code may raise
        message = f"fuser {custom.name} raised {described_with_place(error)}"
        raise NotFoldable("fuser-error", message) from error
    require(
        isinstance(result, nn.Module),
        "fuser-error",
        f"fuser {custom.name} returned a {type(result).__name__}, not an nn.Module",
    )
    module: nn.Module = result
    return module
