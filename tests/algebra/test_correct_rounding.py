"""How many folded weights are the dtype's nearest value to the exact product, by 60-digit arithmetic."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fusecli.algebra import Geometry, LinearOp, batch_norm, fold_output, unpack

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EPS = 1e-5


def trained(dtype: torch.dtype) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(11)
    conv, norm = nn.Conv2d(64, 96, 3).to(dtype), nn.BatchNorm2d(96, eps=EPS).eval()
    with torch.no_grad():
        conv.weight.normal_(std=0.05)
        norm.weight.normal_()
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.01, 3)
    return conv, norm


def exact_scales(norm: nn.BatchNorm2d) -> list[Decimal]:
    return [
        Decimal(gamma) / (Decimal(var) + Decimal(EPS)).sqrt()
        for gamma, var in zip(norm.weight.tolist(), norm.running_var.tolist(), strict=True)
    ]


def halfway(weight: Tensor, step: int) -> list[list[float]]:
    """The midpoint between each weight and its neighbour, one step of magnitude away; exact in float64."""
    neighbour = (weight.view(BITS[weight.dtype]) + step).view(weight.dtype)
    return ((weight.double() + neighbour.double()) / 2).abs().flatten(1).tolist()


def correctly_rounded(folded: Tensor, source: Tensor, norm: nn.BatchNorm2d) -> float:
    """The share of `folded` that no value of its dtype beats, as an answer to source * scale."""
    near, far = halfway(folded, -1), halfway(folded, 1)
    right = 0
    with localcontext() as context:
        context.prec = 60
        for channel, scale in enumerate(exact_scales(norm)):
            row = source[channel].double().abs().flatten().tolist()
            for weight, below, above in zip(row, near[channel], far[channel], strict=True):
                right += Decimal(below) <= abs(Decimal(weight) * scale) <= Decimal(above)
    assert (folded.sign() == source.sign() * norm.weight.sign().view(-1, 1, 1, 1)).all()
    return right / folded.numel()


def folded_weight(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    f = batch_norm(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    at = Geometry.from_attributes((3, 3), (1, 1), (0, 0), (1, 1))
    folded = fold_output(LinearOp(unpack(conv.weight, 1, False), conv.bias, at), f, conv.weight.dtype)
    return folded.weight.squeeze(0)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_folded_weights_are_correctly_rounded(dtype: torch.dtype) -> None:
    conv, norm = trained(dtype)
    assert correctly_rounded(folded_weight(conv, norm), conv.weight.detach(), norm) >= 0.9999


@torch.no_grad()
def test_torch_rounds_two_thirds_of_them_right() -> None:
    conv, norm = trained(torch.float32)
    fused, _ = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    assert correctly_rounded(fused.detach(), conv.weight.detach(), norm) < 0.7
