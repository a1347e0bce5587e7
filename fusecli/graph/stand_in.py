"""Modules synthesised from the shapes of tensors, for a state dict whose model code is not at hand.

What the shapes cannot say (eps, transposed, groups, stride) comes from hints of the spec or the manifest;
eps is never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fusecli.errors import Problem, UsageError

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYER = {"weight", "bias"}
_LAYER_RANKS = range(2, 6)  # of the weight: linear, and up to three spatial axes
_STATISTICS = {"running_mean", "running_var"}
_COUNTER = "num_batches_tracked"


class Unknown(nn.Module):
    """A member that no tensor tells anything about: it is named, and stays where it is."""


@dataclass
class Hints:
    """What is known besides the tensors, where it was said, and what had to be assumed (for the ledger)."""

    kind: str | None = None
    groups: int | None = None
    stride: tuple[int, ...] | None = None
    eps: float | None = None
    transposed: bool | None = None
    where: str = ""
    assumed_eps: float | None = None
    assumed: list[tuple[str, str]] = field(default_factory=list)


def stand_in(path: str, shapes: Shapes, hints: Hints, rank: int) -> nn.Module:
    """A meta module that holds tensors of these shapes (by local name): a layer, a norm or Unknown.

    `rank` is the number of spatial axes of the layer before it: a norm's own tensors do not tell.
    Raises UsageError where the spec has to say more.
    """
    with torch.device("meta"):
        if shapes.keys() >= _STATISTICS:
            module: nn.Module = _norm(path, shapes, hints, rank)
        elif "weight" in shapes and len(shapes["weight"][0]) in _LAYER_RANKS and shapes.keys() <= _LAYER:
            module = _layer(path, shapes["weight"][0], "bias" in shapes, hints)
        else:
            module = Unknown()
    _shape_like(module, shapes)
    return module.eval()


def rank_of(shapes: Shapes) -> int:
    """Spatial axes of the layer that holds these tensors; 0 for a linear layer."""
    return min(max(0, len(shapes["weight"][0]) - 2), len(_NORM)) if "weight" in shapes else 0


def hints_of(layer: nn.Module, norm: nn.Module | None) -> dict[str, Any]:
    """What the tensors of a fused pair cannot say: written to the manifest, read back as Hints."""
    hints: dict[str, Any] = {}
    if isinstance(layer, nn.modules.conv._ConvNd):
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        hints["kind"] = f"conv{'_transpose' if transposed else ''}{len(layer.kernel_size)}d"
        hints |= {"groups": layer.groups, "stride": list(layer.stride)}
    elif isinstance(layer, nn.Linear):
        hints["kind"] = "linear"
    if norm is not None and hasattr(norm, "eps"):
        hints["eps"] = norm.eps
    return hints


def _norm(path: str, shapes: Shapes, hints: Hints, rank: int) -> nn.Module:
    eps = hints.eps
    if eps is None:
        eps = hints.assumed_eps
        if eps is None:
            raise UsageError(
                Problem(
                    f"the eps of {path} is not in a state dict, and it is never guessed",
                    hints.where,
                    "add eps to the group ({modules: [...], eps: 1.0e-5}), or assume: {eps: 1.0e-5} "
                    "(--assume-eps), or model.factory",
                )
            )
        hints.assumed.append((path, f"eps {eps:g}, as the spec assumes"))
    counted = _COUNTER in shapes
    norm = _NORM[max(rank, 1) - 1](shapes["running_mean"][0][0], eps=eps, affine="weight" in shapes)
    if not counted:
        norm.num_batches_tracked = None
    return norm


def _layer(path: str, shape: tuple[int, ...], bias: bool, hints: Hints) -> nn.Module:
    rank = len(shape) - 2
    kind = hints.kind or _guess(path, shape, rank, hints)
    wanted = 0 if kind == "linear" else int(kind[-2])
    if wanted != rank:
        message = f"{path} cannot be a {kind}: its weight has shape {list(shape)}"
        raise UsageError(Problem(message, hints.where, "correct kind in the group"))
    if rank == 0:
        return nn.Linear(shape[1], shape[0], bias=bias)
    groups = hints.groups or 1
    kernel: Any = shape[2:]
    stride: Any = hints.stride if hints.stride and len(hints.stride) == rank else (hints.stride or (1,))[0]
    transposed = kind.startswith("conv_transpose")
    if shape[0] % groups:
        message = f"{path} cannot have {groups} groups: its weight has shape {list(shape)}"
        raise UsageError(Problem(message, hints.where, "correct groups in the group"))
    if transposed:
        return _CONV_TRANSPOSE[rank - 1](
            shape[0], shape[1] * groups, kernel, stride=stride, groups=groups, bias=bias
        )
    return _CONV[rank - 1](shape[1] * groups, shape[0], kernel, stride=stride, groups=groups, bias=bias)


def _guess(path: str, shape: tuple[int, ...], rank: int, hints: Hints) -> str:
    if rank == 0:
        return "linear"
    if hints.transposed is None:
        hints.assumed.append(
            (path, f"a convolution, not a transposed one (weight {list(shape)} does not tell)")
        )
    return f"conv_transpose{rank}d" if hints.transposed else f"conv{rank}d"


def _shape_like(module: nn.Module, shapes: Shapes) -> None:
    """Gives every tensor of the stand-in its stored shape and dtype, on the meta device."""
    for name, (shape, dtype) in shapes.items():
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        if name in module._buffers or not dtype.is_floating_point:
            module._buffers[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
