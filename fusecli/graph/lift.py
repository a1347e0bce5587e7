"""Modules lifted to values of the algebra, and values lowered to the tensors of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fusecli.algebra import ChannelAffine, Geometry, LinearOp, batch_norm, pack, unpack
from fusecli.errors import require
from fusecli.graph.kinds import without_statistics

_REMEDY = "make the weight an ordinary tensor first (torch.nn.utils.{}) and save the checkpoint again"


def linear_op(layer: nn.Module, *, transposed: bool) -> LinearOp:
    """The meaning of a Conv1-3d, ConvTranspose1-3d or Linear: its weight as [g, o, i, *k] (a view) and its bias."""
    refuse_parametrized(layer)
    weight = layer._parameters["weight"]
    assert weight is not None
    groups = int(getattr(layer, "groups", 1))
    bias = layer._parameters.get("bias")
    return LinearOp(
        unpack(weight.detach(), groups, transposed),
        None if bias is None else bias.detach(),
        _geometry(layer, transposed),
    )


def channel_affine(norm: nn.Module) -> ChannelAffine:
    """y = scale x + shift of a norm in inference mode: BatchNorm, SyncBatchNorm, FrozenBatchNorm, InstanceNorm
    with running statistics, and what else keeps weight, bias, running_mean, running_var and eps."""
    refuse_parametrized(norm)
    complete = {"running_mean", "running_var"} <= norm._buffers.keys() and hasattr(norm, "eps")
    lacks = f"{type(norm).__name__} has not got running_mean, running_var and eps under these names"
    require(complete, "no-statistics", lacks, remedy="teach it with extra_mappings (sequence and fuser)")
    missing = without_statistics(norm)
    if missing is not None:
        code, reason = missing
        require(False, code, reason, remedy="only a norm with running statistics is a fixed affine at inference")
    mean, var = norm._buffers["running_mean"], norm._buffers["running_var"]
    assert mean is not None
    assert var is not None
    return batch_norm(mean, var, _eps(norm), _vector(norm, "weight"), _vector(norm, "bias"))


def lowered(path: str, op: LinearOp) -> dict[str, Tensor]:
    """The tensors by state-dict key that make the layer at `path` compute `op`."""
    tensors = {f"{path}.weight": pack(op.weight, op.geometry.transposed)}
    if op.bias is not None:
        tensors[f"{path}.bias"] = op.bias
    return tensors


def refuse_parametrized(module: nn.Module) -> None:
    """A weight that is computed from other tensors cannot be replaced: guards against case 29."""
    computed, how = _computed_weight(module)
    require(
        not computed,
        "parametrized",
        f"its weight is computed from other tensors by {how}",
        remedy=_REMEDY.format(_REMOVERS.get(how, f"the inverse of {how}")),
    )
    lazy = isinstance(module._parameters.get("weight"), nn.parameter.UninitializedParameter)
    require(not lazy, "uninitialised", "its weight has no shape yet", remedy="run the model once, then save it")


_REMOVERS = {
    "weight_norm": "remove_weight_norm",
    "spectral_norm": "remove_spectral_norm",
    "pruning": "prune.remove",
    "parametrize": "parametrize.remove_parametrizations",
}


def _computed_weight(module: nn.Module) -> tuple[bool, str]:
    if parametrize.is_parametrized(module):
        return True, "parametrize"
    names = module._parameters.keys() | module._buffers.keys()
    for how, mark in (("weight_norm", "weight_g"), ("pruning", "weight_mask"), ("spectral_norm", "weight_orig")):
        if mark in names:
            return True, how
    return False, ""


def _geometry(layer: nn.Module, transposed: bool) -> Geometry:
    if isinstance(layer, nn.Linear):
        return Geometry.linear()
    conv: Any = layer
    return Geometry.from_attributes(
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        transposed=transposed,
        output_padding=conv.output_padding if transposed else (),
        padding_mode=conv.padding_mode,
    )


def _eps(norm: nn.Module) -> float:
    eps: Any = norm.eps
    return float(eps)


def _vector(norm: nn.Module, name: str) -> Tensor | None:
    # FrozenBatchNorm keeps gamma and beta as buffers.
    value = norm._parameters.get(name)
    value = norm._buffers.get(name) if value is None else value
    return None if value is None else torch.Tensor.detach(value)
