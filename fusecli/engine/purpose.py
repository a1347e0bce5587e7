"""Groups that are fused already: for what is asked for now, or for the other purpose."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fusecli.engine.decisions import rules_in
from fusecli.errors import require
from fusecli.graph.kinds import LAYER_KINDS, is_norm, kind_of
from fusecli.outcome import Mode
from fusecli.rules import all_rules


def require_same_purpose(paths: Sequence[str], modules: Sequence[nn.Module], rule: str, mode: Mode) -> None:
    """Raises NotFoldable for a group that was folded where it is to be trained, or the other way round.

    rule   the one that has fused it, empty where that is not known
    """
    path, first = paths[0], modules[0]
    kind = type(first).__name__
    if mode == "folded":
        inside = isinstance(first, nn.Sequential)
        own, file = f"list what is inside: [{path}.0, {path}.1]", "run 'fusecli fuse' on its state dict"
        what = f"{path} is a {kind}, fused to be trained: the norm inside is not folded"
        require(not _trains(first), "other-purpose", what, remedy=own if inside else file)
        return
    what = f"{path} is a {kind}, fused for inference: there is no norm left that could be trained"
    require(
        not _folded(first, len(modules), rule),
        "other-purpose",
        what,
        remedy="start from the model as it was before its norms were folded",
    )


def _trains(module: nn.Module) -> bool:
    """Whether there is a norm behind the layer: in a container, or in what quantization was prepared in."""
    if isinstance(module, nn.Sequential):
        return any(map(is_norm, list(module)[1:]))
    norm = module._modules.get("bn")
    return "weight_fake_quant" in module._modules and norm is not None and is_norm(norm)


def _folded(first: nn.Module, members: int, rule: str) -> bool:
    if rule:
        return not rules_in(rule) <= {each.name for each in all_rules("qat")}
    if isinstance(first, nn.Sequential):
        return len(first) < members
    return kind_of(first) in LAYER_KINDS and "weight_fake_quant" not in first._modules
