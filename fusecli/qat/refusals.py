"""Why a layer cannot be trained with simulated quantization: it would compute something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fusecli.errors import Problem
from fusecli.nn import FusedModule, computed_tensor

_TORCH_AO = ("torch.ao.nn.intrinsic", "torch.ao.nn.qat")
# Where each kind of module says what it computes; a subclass that leaves these alone computes the same.
_CODE: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: ("forward", "_conv_forward"),
    nn.Conv2d: ("forward", "_conv_forward"),
    nn.Conv3d: ("forward", "_conv_forward"),
    nn.Linear: ("forward",),
    nn.SyncBatchNorm: ("forward",),
    _BatchNorm: ("forward",),
    nn.ReLU: ("forward",),
    FusedModule: ("forward",),
}


def foreign(module: nn.Module) -> bool:
    """Whether it is one of torch.ao's fused or prepared modules, which nothing here imports."""
    return type(module).__module__.startswith(_TORCH_AO)


def problems(path: str, module: nn.Module) -> Iterator[Problem]:
    """What is in the way of preparing this layer or container; `path` is its name in the model."""
    if foreign(module):
        fix = "build the model without torch.ao: fusecli.fuse_modules_qat, then fusecli.qat.prepare_qat"
        yield Problem(f"{_name(module)} is a module of torch.ao", path, fix)
        return
    members = list(module.named_children()) if isinstance(module, FusedModule) else []
    named = [(path, module), *((f"{path}.{name}" if path else name, member) for name, member in members)]
    for where, each in named:
        yield from _own_code(where, each)
    for where, layer in named[1:2] or named:
        yield from _no_plain_weight(where, layer)
    for where, member in named[1:]:
        if isinstance(member, _BatchNorm):
            yield from _cannot_be_folded(where, member, named[1][1])
        elif hooks(member) and not computed_tensor(member)[0]:
            fix = f"register it on '{path}' itself, or on a batch norm in it"
            yield Problem(
                "the hook would never be called, since the layer runs as a part of its container", where, fix
            )


def hooks(module: nn.Module) -> bool:
    """Whether there is any hook on the module, forward, backward or of its state dict."""
    return any(value for name, value in vars(module).items() if "_hook" in name and isinstance(value, dict))


def _own_code(where: str, module: nn.Module) -> Iterator[Problem]:
    kind = next((kind for kind in _CODE if isinstance(module, kind)), None)
    for name in _CODE[kind] if kind else ():
        if name in vars(module) or getattr(type(module), name) is not getattr(kind, name):
            what = f"{_name(module)} has a {name} of its own, which rounding cannot be put into"
            assert kind is not None
            yield Problem(what, where, f"put a plain {kind.__name__.strip('_')} in its place")
            return


def _no_plain_weight(where: str, layer: nn.Module) -> Iterator[Problem]:
    name, how = computed_tensor(layer)
    weight = layer._parameters.get("weight")
    if name:
        fix = "make it plain first: torch.nn.utils.parametrize.remove_parametrizations, or fuse with bake"
        yield Problem(f"its {name} is computed by {how}", where, fix)
    elif weight is None:
        yield Problem("its weight is no parameter of its own", where, "give it a weight that is one")
    elif isinstance(weight, nn.UninitializedParameter):
        yield Problem("its weight has no shape yet", where, "run the model once first")


def _cannot_be_folded(where: str, bn: _BatchNorm, layer: nn.Module) -> Iterator[Problem]:
    outputs: Any = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    if bn.running_var is None:
        fix = "build it with track_running_stats=True"
        yield Problem("the norm has no running statistics, so it can never be folded", where, fix)
    if bn.num_features != outputs:
        what = f"the norm has {bn.num_features} channels, the layer before it {outputs}"
        yield Problem(what, where, "leave the two unfused")


def _name(module: nn.Module) -> str:
    return type(module).__name__
