"""Copies of single modules with other tensors in them: real ones for a meta model, float64 ones for a proof."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def with_tensors(module: nn.Module, fetch: Callable[[str, Tensor], Tensor], prefix: str = "") -> nn.Module:
    """A copy of `module` whose every parameter and buffer is `fetch(name, old)`; nothing else is copied.

    Hooks stay behind: a proof or a fold must not run code that watches the user's model.
    """
    clone = copy.copy(module)
    for name, value in list(clone.__dict__.items()):
        if isinstance(value, dict):
            clone.__dict__[name] = type(value)() if name.startswith(_HOOKS) else copy.copy(value)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            value = fetch(prefix + name, parameter.detach())
            clone._parameters[name] = nn.Parameter(value, parameter.requires_grad and value.is_floating_point())
    for name, buffer in module._buffers.items():
        if buffer is not None:
            clone._buffers[name] = fetch(prefix + name, buffer)
    for name, child in module._modules.items():
        if child is not None:
            clone._modules[name] = with_tensors(child, fetch, f"{prefix}{name}.")
    return clone


def in_float64(module: nn.Module) -> nn.Module:
    """A copy of `module` with its floating-point tensors in float64."""
    return with_tensors(module, lambda _, old: old.double() if old.is_floating_point() else old.clone())


def from_store(module: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `module`, which stands at `path`, that holds `tensors` (by state-dict key) where there are any."""
    return with_tensors(module, lambda name, old: tensors.get(f"{path}.{name}", old))


def probe_input(module: nn.Module, generator: torch.Generator) -> Tensor:
    """A random float64 input that `module`, the first of a group, accepts.

    [n, c, *spatial] for convolutions and norms, [n, c] for linear layers and BatchNorm1d. The spatial size is
    odd and larger than the kernel, so that strides and one-sided padding show.
    """
    return torch.randn(_probe_shape(module), generator=generator, dtype=torch.float64)


def _probe_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.Linear):
        return (5, module.in_features)
    if isinstance(module, nn.modules.conv._ConvNd):
        spans = zip(module.kernel_size, module.dilation, module.stride, strict=True)
        spatial = (dilation * (kernel - 1) + 2 * stride + 3 for kernel, dilation, stride in spans)
        return (2, module.in_channels, *spatial)
    mean = module._buffers.get("running_mean")
    if mean is None:
        raise TypeError(f"no input is known for {type(module).__name__}")
    rank = {"1": 0, "2": 2, "3": 3}.get(type(module).__name__[-2:-1], 2)
    return (5, mean.numel(), *(3,) * rank)
