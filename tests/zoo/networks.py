"""pytorchcv's architectures: built, given numbers and an input, and watched while they run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fusecli.engine import Decision
from fusecli.graph.kinds import norms
from fusecli.sample import Sample, tensors_in
from tests import nets

Zoo = Mapping[str, Callable[..., nn.Module]]

# The shapes that a forward takes where it takes no single image; integers are a tensor of that one number.
SHAPES: dict[str, tuple[tuple[int, ...] | int, ...]] = {
    "jasper5x3": ((1, 64, 120), 120),
    "pfpcnet": ((1, 1, 320, 240),),
    "quartznet5x5_en_ls": ((1, 64, 120), 120),
    "visemenet20": ((34, 8, 195), (34, 76)),
    "voca8flame": ((1, 1, 16, 29), 1),
}
# What is not the default: an image of a street is as large as a screen, and audio needs a package of its own.
SETTINGS: dict[str, dict[str, object]] = {
    "_cityscapes": {"in_size": (128, 256)},
    "_celebamaskhq": {"in_size": (128, 128)},
    "_voc": {"in_size": (128, 128)},
    "ibppose_coco": {"in_size": (128, 128)},
    "jasper5x3": {"from_audio": False},
    "quartznet5x5_en_ls": {"from_audio": False},
}


def constructors() -> Zoo:
    """The constructors of pytorchcv by name, imported beside a torchvision that has one empty class: it is
    needed for a layer of one network, which is not built here."""
    vision, ops = ModuleType("torchvision"), ModuleType("torchvision.ops")
    ops.DeformConv2d = type("DeformConv2d", (nn.Module,), {})  # type: ignore[attr-defined]
    real = {name: sys.modules.get(name) for name in ("torchvision", "torchvision.ops")}
    sys.modules |= {"torchvision": vision, "torchvision.ops": ops}
    try:
        from pytorchcv.model_provider import _models  # type: ignore[import-untyped]
    finally:
        for name, module in real.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    models: Zoo = _models
    return models


def built(zoo: Zoo, name: str) -> nn.Module:
    """The architecture, without trained weights."""
    settings = (given for end, given in SETTINGS.items() if name.endswith(end))
    return zoo[name](**next(settings, {})).eval()


def sample_for(name: str, model: Any) -> Sample:
    """A batch of one, as large as the network says."""
    if name in SHAPES:
        shapes = SHAPES[name]
        return Sample(tuple(torch.tensor([s]) if isinstance(s, int) else nets.images(*s) for s in shapes))
    return Sample((nets.images(1, 3, *getattr(model, "in_size", (224, 224))),))


def trained(model: nn.Module) -> nn.Module:
    """With random numbers whose size does not explode in a deep network."""
    nets.randomise(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.div_(parameter[0].numel() ** 0.5)
    return model


def ran(model: nn.Module, sample: Sample) -> tuple[Any, list[str]]:
    """What `model` gives for `sample`, and the norms with running statistics that ran meanwhile, by name."""
    names: dict[str, None] = {}
    watched = {id(m): (path, m) for path, m in reversed([*norms(dict(model.named_modules()))])}
    hooks = [
        module.register_forward_hook(lambda *_, path=path: names.setdefault(path))  # gives None: no effect
        for path, module in watched.values()
        if getattr(module, "running_mean", None) is not None
    ]
    try:
        with torch.no_grad():
            output = model(*sample.copy().args)
    finally:
        for hook in hooks:
            hook.remove()
    return output, list(names)


def far(one: object, other: object) -> float:
    """max|a - b| / max|a|, of the worst output."""

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max() / a.abs().max())

    return max(relative(a, b) for a, b in zip(tensors_in(one), tensors_in(other), strict=True))


RESHAPING = {"shared_layer_bn", "pointwise_chain", "parallel_layers", "parallel_norm"}


def names_moved(model: nn.Module, fused: nn.Module, decisions: Sequence[Decision]) -> list[str]:
    """What a user of `model` would miss in `fused`: its class, and keys of the state dict. Those that are new
    (but for the bias of a layer), hold another shape, or are gone from a module that has others still. Left
    out are layers that stand for several now, and norms whose place a copy of a layer has taken."""
    cloned = {path for d in decisions if RESHAPING & {*d.rule.split("+")} for path in d.members}
    before, after = model.state_dict(), fused.state_dict()
    holders = {key.rpartition(".")[0] for key in after}
    moved = [type(fused).__qualname__] if type(fused) is not type(model) else []
    for key, tensor in after.items():
        if key in before:
            moved += [key] * (before[key].shape != tensor.shape)
        elif not (key.endswith(".bias") and f"{key[:-4]}weight" in before):
            moved.append(key)
    moved += [key for key in before if key not in after and key.rpartition(".")[0] in holders]
    return [key for key in moved if key.rpartition(".")[0] not in cloned]
