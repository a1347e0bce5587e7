"""Folds of a layer and its norm, as a custom fuser makes them: the right one, and those with one thing wrong.

Tests copy this file into the folder of a spec, which names its functions; so it imports nothing of the tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def right(is_qat: bool, layer: Any, norm: Any) -> nn.Module:
    return _folded(layer, *_affine(norm))


def other_eps(is_qat: bool, layer: Any, norm: Any) -> nn.Module:
    return _folded(layer, *_affine(norm, eps=norm.eps * 100))


def negated_gamma(is_qat: bool, layer: Any, norm: Any) -> nn.Module:
    """In one channel, and in what the mean is multiplied with as well."""
    gamma = norm.weight.detach().double().clone()
    gamma[_channel(norm)] *= -1
    return _folded(layer, *_affine(norm, gamma))


def absolute_gammas(is_qat: bool, layer: Any, norm: Any) -> nn.Module:
    """What comes of a scale that is taken to be positive: the right fold, where no gamma is negative."""
    return _folded(layer, *_affine(norm, norm.weight.detach().double().abs()))


def one_permille(is_qat: bool, layer: Any, norm: Any) -> nn.Module:
    """The weights of one channel are off by 0.1 %."""
    fold, channel = right(is_qat, layer, norm), _channel(norm)
    _rows(fold)[channel] *= 1.001
    return fold


def one_nan(is_qat: bool, layer: Any, norm: Any) -> nn.Module:
    fold = right(is_qat, layer, norm)
    row = _rows(fold)[_channel(norm)]
    row[(0,) * row.dim()] = torch.nan
    return fold


def rolled(is_qat: bool, layer: Any, norm: Any) -> nn.Module:
    """Each channel is where the one behind it belongs."""
    fold: Any = right(is_qat, layer, norm)
    _rows(fold).copy_(_rows(fold).roll(1, 0))
    fold.bias.copy_(fold.bias.roll(1, 0))
    return fold


def rolled_norm(is_qat: bool, layer: Any, norm: Any) -> nn.Module:
    """The filters are in place, and each is scaled and shifted as the one before it."""
    scale, shift = _affine(norm)
    return _folded(layer, scale.roll(1, 0), shift.roll(1, 0))


def forgotten_bias(is_qat: bool, layer: Any, norm: Any) -> nn.Module:
    """The weights are right, and there is no shift."""
    fold: Any = right(is_qat, layer, norm)
    fold.bias.zero_()
    return fold


def forgotten_mean(is_qat: bool, layer: Any, norm: Any) -> nn.Module:
    scale, _ = _affine(norm)
    return _folded(layer, scale, norm.bias.detach().double())


Fault = Callable[[bool, Any, Any], nn.Module]
FAULTS: dict[str, Fault] = {
    "other_eps": other_eps,
    "negated_gamma": negated_gamma,
    "absolute_gammas": absolute_gammas,
    "one_permille": one_permille,
    "one_nan": one_nan,
    "rolled": rolled,
    "rolled_norm": rolled_norm,
    "forgotten_bias": forgotten_bias,
    "forgotten_mean": forgotten_mean,
}


def _affine(norm: Any, gamma: Tensor | None = None, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """What an eval batch norm multiplies with and adds, in float64."""
    gamma = norm.weight.detach().double() if gamma is None else gamma
    scale = gamma / (norm.running_var.double() + (norm.eps if eps is None else eps)).sqrt()
    return scale, norm.bias.detach().double() - norm.running_mean.double() * scale


def _folded(layer: Any, scale: Tensor, shift: Tensor) -> nn.Module:
    """A copy of the layer with the norm in it, computed in float64 and rounded once; without gradients."""
    fold = copy.deepcopy(layer).requires_grad_(False)
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    rows = _rows(fold)
    rows.copy_(rows.double() * scale.view(-1, *[1] * (rows.dim() - 1)))
    fold.bias = nn.Parameter((bias * scale + shift).to(rows.dtype), requires_grad=False)
    return fold


def _rows(layer: Any) -> Tensor:
    """The weight, seen with the channels that the layer makes on the first axis."""
    weight: Tensor = layer.weight
    return weight.transpose(0, 1) if "Transpose" in type(layer).__name__ else weight


def _channel(norm: Any) -> int:
    """One of middling variance: the outputs of a dead one are the same whatever its weights are."""
    return int(norm.running_var.argsort()[len(norm.running_var) // 2])
