"""Copies of modules with other tensors in them: real ones for a meta model, float64 ones for a proof."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.nn import computes, make_plain
from fusecli.nn.duplicate import duplicate as duplicate  # copies of whole models are asked for here too

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def with_tensors(module: nn.Module, fetch: Callable[[str, Tensor], Tensor], prefix: str = "") -> nn.Module:
    """A copy of `module` whose every parameter and buffer is `fetch(name, old)`; nothing else is copied.

    Hooks stay behind: a proof or a fold must not run code that watches the user's model. Those that compute a
    weight are part of what the module computes.
    """
    # Not copy.copy(): parametrized modules refuse it, because pickling them would not work.
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if name.startswith(_HOOKS):
            clone.__dict__[name] = type(value)((key, hook) for key, hook in value.items() if computes(hook))
        elif isinstance(value, dict | list | set):
            clone.__dict__[name] = copy.copy(value)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            value = fetch(prefix + name, parameter.detach())
            with torch.inference_mode(value.is_inference()):  # elsewhere such a tensor takes no gradients
                clone._parameters[name] = nn.Parameter(
                    value, parameter.requires_grad and value.is_floating_point()
                )
    for name, buffer in module._buffers.items():
        if buffer is not None:
            clone._buffers[name] = fetch(prefix + name, buffer)
    for name, child in module._modules.items():
        if child is not None:
            clone._modules[name] = with_tensors(child, fetch, f"{prefix}{name}.")
    return clone


def in_eval_mode(module: nn.Module) -> nn.Module:
    """The module itself; a class may have a train() that returns nothing."""
    module.eval()
    return module


def in_float64(module: nn.Module) -> nn.Module:
    """A copy of `module` with its floating-point tensors in float64; it shares no memory with `module`."""
    return with_tensors(
        module, lambda _, old: old.to(torch.float64, copy=True) if old.is_floating_point() else old.clone()
    )


def materialised(module: nn.Module) -> nn.Module:
    """A copy of `module` in float64 and eval mode, its computed tensors plain parameters, not rounded."""
    wide = in_float64(module).eval()
    make_plain(wide)
    return wide


def probe_input(module: nn.Module, generator: torch.Generator) -> Tensor:
    """A random float64 input that `module`, the first of a group, accepts.

    [n, c, *spatial] for convolutions and norms, [n, c] for linear layers and BatchNorm1d. The spatial size is
    larger than the kernel, so that strides and one-sided padding show.
    """
    return torch.randn(_probe_shape(module), generator=generator, dtype=torch.float64)


# A class may do something else where numbers are large, such as clamp at 50, or where they are small.
_SCALES = (1.0, 1e3, 1e-3, 30.0)


def probe_inputs(module: nn.Module, seed: int) -> Iterator[Tensor]:
    """Several inputs as `probe_input` makes them: of other sizes, and of numbers of other sizes.

    Every spatial axis is even and odd, alone and with the others, and leaves every remainder of a stride.
    """
    shape = _probe_shape(module)
    rank, generator = len(shape) - 2, torch.Generator().manual_seed(seed)
    mixed = [tuple(axis % 2 == odd for axis in range(rank)) for odd in (0, 1)] if rank > 1 else []
    furthest = max(2, *getattr(module, "stride", ())) if hasattr(module, "in_channels") else 2
    steps = [(more,) * rank for more in range(min(furthest, _REMAINDERS))]
    shapes = [tuple(map(sum, zip(shape[2:], more, strict=True))) for more in (*steps, *mixed)]
    for number in range(max(len(_SCALES), len(shapes))):
        drawn = torch.randn(
            *shape[:2], *shapes[number % len(shapes)], generator=generator, dtype=torch.float64
        )
        yield drawn * _SCALES[number % len(_SCALES)]


_REMAINDERS = 8  # of a stride: a patch embedding of 32 x 32 takes what is larger anyway


def _probe_shape(module: nn.Module) -> tuple[int, ...]:
    # By attributes: a class that is only treated as a convolution has no base in common with torch's.
    layer: Any = module
    if hasattr(layer, "in_features"):
        return (5, layer.in_features)
    if hasattr(layer, "in_channels"):
        spans = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        spatial = (dilation * (kernel - 1) + 2 * stride + 3 for kernel, dilation, stride in spans)
        return (2, layer.in_channels, *spatial)
    mean = module._buffers.get("running_mean")
    if mean is None:
        raise TypeError(f"no input is known for {type(module).__name__}")
    rank = {"1": 0, "2": 2, "3": 3}.get(type(module).__name__[-2:-1], 2)
    return (5, mean.numel(), *(3,) * rank)
