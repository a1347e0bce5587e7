"""Modules lifted to values of the algebra, and values lowered to the tensors of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusecli.algebra import ChannelAffine, Geometry, LinearOp, batch_norm, pack, unpack
from fusecli.errors import require
from fusecli.graph.kinds import is_exact, without_statistics
from fusecli.nn import Adapted, computed_tensor

_REMEDY = (
    "say `bake: true` in the spec, or make the {} an ordinary tensor first (torch.nn.utils.{}) and save the "
    "checkpoint again"
)


def linear_op(layer: nn.Module, *, transposed: bool) -> LinearOp:
    """The meaning of a Conv1-3d, ConvTranspose1-3d or Linear: weight as [g, o, i, *k] (a view) and bias."""
    refuse_parametrized(layer)
    weight = layer._parameters.get("weight")
    lacks = f"{type(layer).__name__} has no parameter called weight"
    require(
        weight is not None, "no-weight", lacks, remedy="teach it with extra_mappings (sequence and fuser)"
    )
    assert weight is not None
    return _op(layer, weight, layer._parameters.get("bias"), transposed)


def adapter_of(layer: nn.Module) -> tuple[LinearOp, LinearOp, LinearOp, ChannelAffine]:
    """The meaning of a fusecli.nn.Adapted layer: itself, A with its geometry, B, the scale of B A."""
    assert isinstance(layer, Adapted)
    weight = layer._parameters["weight"]
    assert weight is not None
    base = _op(layer, weight, layer._parameters.get("bias"), False)
    down = _op(layer, layer.lora_A, None, False)
    ones = (1,) * base.rank
    up = LinearOp(unpack(layer.lora_B.detach(), 1, False), None, Geometry(ones, ((0, 0),) * base.rank, ones))
    scale = torch.full([base.out_channels], layer.lora_scale, dtype=torch.float64, device=weight.device)
    return base, down, up, ChannelAffine(scale, torch.zeros_like(scale), shifts=False)


def _op(layer: nn.Module, weight: Tensor, bias: Tensor | None, transposed: bool) -> LinearOp:
    return LinearOp(
        unpack(weight.detach(), int(getattr(layer, "groups", 1)), transposed),
        None if bias is None else bias.detach(),
        Geometry.linear() if weight.ndim == 2 else _geometry(layer, transposed),
    )


def channel_affine(norm: nn.Module) -> ChannelAffine:
    """y = scale x + shift of a norm in inference mode: BatchNorm, SyncBatchNorm, FrozenBatchNorm,
    InstanceNorm with running statistics, and what else keeps weight, bias, running_mean, running_var, eps."""
    require_fixed(norm)
    mean, var = norm._buffers["running_mean"], norm._buffers["running_var"]
    assert mean is not None
    assert var is not None
    return batch_norm(mean, var, float(norm.eps), _vector(norm, "weight"), _vector(norm, "bias"))  # type: ignore[arg-type]


def require_fixed(norm: nn.Module) -> None:
    """Guard: the norm keeps the statistics that make it one affine at inference."""
    refuse_parametrized(norm)
    eps: Any = getattr(norm, "eps", None)
    complete = {"running_mean", "running_var"} <= norm._buffers.keys() and isinstance(eps, int | float)
    lacks = f"{type(norm).__name__} has not got running_mean, running_var and eps under these names"
    require(complete, "no-statistics", lacks, remedy="teach it with extra_mappings (sequence and fuser)")
    missing = without_statistics(norm)
    if missing is not None:
        code, reason = missing
        require(
            False, code, reason, remedy="only a norm with running statistics is a fixed affine at inference"
        )


def lowered(path: str, op: LinearOp) -> dict[str, Tensor]:
    """The tensors by state-dict key that make the layer at `path` compute `op`."""
    tensors = {f"{path}.weight": pack(op.weight, op.geometry.transposed)}
    if op.bias is not None:
        tensors[f"{path}.bias"] = op.bias
    return tensors


def sizes_of(op: LinearOp, path: str, layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """The attributes that a Conv1-3d, ConvTranspose1-3d or Linear needs to have the sizes of `op`."""
    at, old = op.geometry, linear_op(layer, transposed=op.geometry.transposed).geometry
    require(
        is_exact(layer) and (at.padding_mode == old.padding_mode or not at.padded),
        "fixed-size",
        f"{path} is a {type(layer).__name__}, whose sizes cannot be changed",
        remedy="keep both layers",
    )
    even = all(before == after for before, after in at.padding)
    require(
        even, "not-aligned", f"{path} would have to pad unevenly: {at.padding}", remedy="keep both layers"
    )
    if at.rank == 0:
        return {"in_features": (op.in_channels,), "out_features": (op.out_channels,)}
    return {
        "in_channels": (op.in_channels,),
        "out_channels": (op.out_channels,),
        "kernel_size": op.kernel,
        "stride": at.stride,
        "padding": tuple(before for before, _ in at.padding),
        "dilation": at.dilation,
    }


def refuse_parametrized(module: nn.Module) -> None:
    """A weight that is computed from other tensors cannot be replaced: guards against case 29."""
    name, how = computed_tensor(module)
    require(
        not how,
        "parametrized",
        f"its {name} is computed from other tensors by {how}",
        remedy=_REMEDY.format(name, _REMOVERS.get(how, "")),
    )
    lazy = isinstance(module._parameters.get("weight"), nn.parameter.UninitializedParameter)
    require(
        not lazy, "uninitialised", "its weight has no shape yet", remedy="run the model once, then save it"
    )


_REMOVERS = {
    "weight_norm": "remove_weight_norm",
    "spectral_norm": "remove_spectral_norm",
    "pruning": "prune.remove",
    "parametrize": "parametrize.remove_parametrizations",
}


_ATTRIBUTES = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


def _geometry(conv: Any, transposed: bool) -> Geometry:
    lacks = [name for name in _ATTRIBUTES if not hasattr(conv, name)]
    message = f"{type(conv).__name__} has no attribute {', '.join(lacks)}, which a convolution has"
    require(not lacks, "no-geometry", message, remedy="teach it with extra_mappings (sequence and fuser)")
    return Geometry.from_attributes(
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        transposed=transposed,
        output_padding=conv.output_padding if transposed else (),
        padding_mode=conv.padding_mode,
    )


def _vector(norm: nn.Module, name: str) -> Tensor | None:
    # FrozenBatchNorm keeps gamma and beta as buffers.
    parameter = norm._parameters.get(name)
    value = norm._buffers.get(name) if parameter is None else parameter
    return None if value is None else torch.Tensor.detach(value)
