"""torchao's two steps on a graph: observers put in, and observers made into quantize and dequantize."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fusecli.errors import Problem, UsageError
from fusecli.int8.quantizer import quantizer
from fusecli.int8.torchao import flow, quiet
from fusecli.int8.units import Options, QuantUnit


def norm(*arguments: Any) -> Any:
    return torch.ops.aten.batch_norm.default(*arguments)


def inference_norm(*arguments: Any) -> Any:
    return torch.ops.aten._native_batch_norm_legit_no_training.default(*arguments)


# torchao folds norms by itself while it prepares, also behind a layer that others read: it must not see them.
HIDDEN = {
    torch.ops.aten.batch_norm.default: norm,
    torch.ops.aten._native_batch_norm_legit_no_training.default: inference_norm,
}
SHOWN = {function: op for op, function in HIDDEN.items()}


def retargeted(module: GraphModule, targets: Mapping[Any, Any]) -> GraphModule:
    for node in module.graph.nodes:
        node.target = targets.get(node.target, node.target) if node.op == "call_function" else node.target
    module.recompile()
    return module


def prepare(module: GraphModule, units: Sequence[QuantUnit], options: Options) -> GraphModule:
    """A copy of the graph with an observer behind every value that will be quantized."""
    torchao = flow()
    with quiet():
        prepared: GraphModule = torchao.prepare(
            retargeted(copy.deepcopy(module), HIDDEN), quantizer(units, options)
        )
    return prepared.requires_grad_(False)


def convert(prepared: GraphModule) -> GraphModule:
    """The prepared graph with integers for weights, and nothing left of what no op reads."""
    with quiet():
        return pruned(retargeted(flow().convert(prepared), SHOWN))


def observers(prepared: GraphModule) -> Iterator[tuple[Node, Any]]:
    """Every observed value and its observer, in the order of the run; one scale is one observer."""
    for node in prepared.graph.nodes:
        if node.op == "call_module":
            observer = prepared.get_submodule(node.target)
            if hasattr(observer, "calculate_qparams"):
                yield node.args[0], observer


def fix(value: Node, observer: Any, scale: Tensor, zero_point: Tensor, name: str) -> None:
    """Makes the observer answer with exactly these, whatever it has seen: no range rounds to a given scale.

    Raises UsageError where they are no scales and zero points of this value: one of each, or one per channel.
    """
    scale, zero_point = scale.detach().to(torch.float32).reshape(-1), zero_point.detach().reshape(-1)
    axis = getattr(observer, "ch_axis", None)
    channels = value.meta["val"].shape[axis] if axis is not None else 1
    if scale.numel() == 1 and zero_point.numel() in (1, channels):
        scale = scale.expand(channels)
    zero_point = zero_point.to(torch.int64).expand(channels) if zero_point.numel() == 1 else zero_point
    # Of the dtype, not of the range in use: torch.ao gives a channel of positive weights alone -128.
    limits = torch.iinfo(observer.dtype)
    integers = (limits.min <= zero_point) & (zero_point <= limits.max)
    sane = torch.isfinite(scale).all() and (scale > 0).all() and integers.all()
    if scale.numel() != channels or zero_point.numel() != channels or not sane:
        fix = f"give {channels} finite scales above 0, and {channels} zero points or one"
        raise UsageError(Problem("these are no scale and zero point of it", name, fix))
    fixed = scale.clone(), zero_point.to(torch.int64).clone()
    observer.calculate_qparams = lambda: fixed


def pruned(module: GraphModule) -> GraphModule:
    """The module without the parameters and buffers that its graph does not read: the float weights."""
    module.graph.eliminate_dead_code()
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name in [name for name, _ in held if name not in read]:
        owner, _, attribute = name.rpartition(".")
        delattr(module.get_submodule(owner), attribute)
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The parameter, buffer or constant of that name."""
    owner, _, attribute = name.rpartition(".")
    value = getattr(module.get_submodule(owner), attribute)
    assert isinstance(value, Tensor), name
    return value
