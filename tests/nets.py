"""Tiny named networks, each with one peculiarity, and trained-looking numbers for any of them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """`model` in eval mode with random weights and statistics, every third gamma negative: with fresh
    statistics most wrong folds are invisible."""
    rng = torch.Generator().manual_seed(seed)
    tensors = (*model.named_parameters(), *model.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors:
            if tensor.is_floating_point():
                value = torch.randn(tensor.shape, generator=rng, dtype=torch.float64)
                value = value.abs() + 0.1 if name.endswith("running_var") else value
                tensor.copy_(value)
        for module in model.modules():
            if "running_mean" in module._buffers and getattr(module, "weight", None) is not None:
                module.weight[::3] = -module.weight[::3].abs() - 0.1
    model.eval()
    return model


def chain(seed: int = 0, **modules: nn.Module) -> Any:
    """A randomised Sequential whose children have these names."""
    return randomise(nn.Sequential(OrderedDict(modules)), seed)


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random input."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conv_bn(**attributes: Any) -> Any:
    """conv -> bn on [n, 3, h, w]."""
    return chain(conv=nn.Conv2d(3, 6, 3, **attributes), bn=nn.BatchNorm2d(6))


def two_pairs() -> Any:
    """conv1 -> bn1 -> relu1 -> conv2 -> bn2 on [n, 3, h, w]."""
    return chain(
        conv1=nn.Conv2d(3, 6, 3),
        bn1=nn.BatchNorm2d(6),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(6, 4, 3, bias=False),
        bn2=nn.BatchNorm2d(4),
    )


def float64(model: nn.Module) -> Any:
    """A copy in float64: what a fold is held against."""
    return copy.deepcopy(model).double().eval()


class SamePadConv2d(nn.Conv2d):
    """Pads in its forward as TensorFlow does: as much as the output size needs, more at the end."""

    def forward(self, x: Tensor) -> Tensor:
        margins: list[int] = []
        for size, kernel, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            margins += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, margins), self.weight, self.bias, self.stride)


class StandardisedConv2d(nn.Conv2d):
    """Standardises its weight in forward: scaling the stored one changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias)


class BiasBlindConv2d(nn.Conv2d):
    """Ignores its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class BrokenConv2d(nn.Conv2d):
    """Takes a second argument, so that nobody can run it in a row."""

    def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        return super().forward(x * scale)


class ForeignConv(nn.Module):
    """A convolution that shares no base class with torch's: only `treat` says what it is."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.register_parameter("bias", None)
        self.in_channels, self.out_channels, self.groups = inputs, outputs, 1
        self.kernel_size = (kernel, kernel)
        self.stride, self.padding, self.dilation, self.padding_mode = (1, 1), (0, 0), (1, 1), "zeros"

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class ForeignLinear(nn.Module):
    """A dense layer that shares no base class with torch's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class FrozenBatchNorm2d(nn.Module):
    """The class of torchvision and detectron2: four buffers, no parameters, no common base."""

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (
            getattr(self, name).reshape(1, -1, 1, 1)
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class BatchNormAct2d(nn.BatchNorm2d):
    """A norm with a drop and an activation inside, as timm has it."""

    def __init__(self, features: int, act: nn.Module) -> None:
        super().__init__(features)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class ActFirstNorm2d(BatchNormAct2d):
    """The same submodules, called before the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(x))


class ReluNorm2d(nn.BatchNorm2d):
    """An activation that no submodule shows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class AlwaysDropout(nn.Dropout):
    """Monte-Carlo dropout: drops in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)
