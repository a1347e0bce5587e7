"""Copies of modules with other tensors in them: real ones for a meta model, float64 ones for a proof."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fusecli.graph.memory import key_of, tensors_held
from fusecli.nn import computes, make_plain

_COPYABLE = (torch.strided, torch.sparse_coo)
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


def duplicate(model: nn.Module, instead: Mapping[int, object] | None = None) -> nn.Module:
    """A deep copy of `model`; `instead` says, by id, what it holds where the original holds something else.

    torch copies no tensor that autograd has computed, such as the weight that weight_norm keeps beside its
    parameters, or an activation that a forward has left behind, and no compressed sparse one: of those the
    copy gets the values, and where they are a view of a parameter a view of the copy's.
    """
    memo: dict[int, Any] = dict(instead or {})
    own = {key_of(parameter)[0] for parameter in model.parameters() if not is_lazy(parameter)}
    for value in (tensor for module in model.modules() for _, tensor in tensors_held(module)):
        if id(value) in memo or (value.is_leaf and value.layout in _COPYABLE):
            continue
        if key_of(value)[0] in own:
            memo[id(value)] = copy.deepcopy(value.detach(), memo)  # which copies each memory once
        else:
            memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def in_float64(module: nn.Module) -> nn.Module:
    """A copy of `module` with its floating-point tensors in float64; it shares no memory with `module`."""
    return with_tensors(
        module, lambda _, old: old.clone().double() if old.is_floating_point() else old.clone()
    )


def materialised(module: nn.Module) -> nn.Module:
    """A copy of `module` in float64 and eval mode, its computed tensors plain parameters, not rounded."""
    wide = in_float64(module).eval()
    make_plain(wide)
    return wide


def from_store(module: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `module`, which stands at `path`, with `tensors` (by state-dict key) where there are any."""
    return with_tensors(module, lambda name, old: tensors.get(f"{path}.{name}", old))


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
