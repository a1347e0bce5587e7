"""Models between fusecli.nn's containers and those of torch.ao: the one file that imports torch.ao.

It is deprecated and due for removal, so it is imported when a function is called, and its warnings about that
go nowhere.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from fusecli import nn as fused
from fusecli.errors import Problem, UsageError
from fusecli.graph.materialise import duplicate

_log = logging.getLogger("fusecli")

# BNReLU1d is not among them: torch.ao has no such class.
_SHARED = (
    *(fused.ConvReLU1d, fused.ConvReLU2d, fused.ConvReLU3d, fused.LinearReLU),
    *(fused.BNReLU2d, fused.BNReLU3d),
    *(fused.ConvBn1d, fused.ConvBn2d, fused.ConvBn3d),
    *(fused.ConvBnReLU1d, fused.ConvBnReLU2d, fused.ConvBnReLU3d, fused.LinearBn1d),
)
# Where the classes come from that a model has only after prepare or prepare_qat, and after convert.
_PREPARED = (
    *("torch.ao.nn.intrinsic.qat.", "torch.ao.nn.qat."),
    *("torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize"),
)
_QUANTIZED = ("torch.ao.nn.intrinsic.quantized.", "torch.ao.nn.quantized.")
# Float modules, which a model that torch.ao will quantize has from the start.
_FUNCTIONAL = ("FloatFunctional", "FXFloatFunctional")
_SHOWN = 6
_WHOLE_NORM = "leave this group out when fusing, or give the norm affine=True and track_running_stats=True"
_SAVE = "save its state dict and run 'fusecli fuse' on that file, which reads this layout"
_SAVE_EARLIER = (
    "save the state dict of the model as it was before convert, and run 'fusecli fuse' on that file"
)


def to_torch_ao(model: nn.Module, inplace: bool = False) -> nn.Module:
    """`model` with torch.ao.nn.intrinsic's containers in the place of fusecli.nn's, with the same children.

    inplace   change `model` itself; else a copy is changed, which shares nothing with it

    torch.ao's prepare, prepare_qat and convert know their own classes only. Hooks, modes and attributes stay,
    and so does what is shared. BNReLU1d stays as it is: torch.ao has none. prepare_qat makes a norm in eval
    mode learn again; that is logged. Raises UsageError, and changes nothing, where torch.ao would refuse what
    is in a container: a subclass of what it knows, a norm without gamma and beta or running statistics.
    """
    theirs = _classes("to_torch_ao")
    found = [(name, module) for name, module in model.named_modules() if type(module) in theirs]
    problems = [problem for name, module in found for problem in _refusals(name, module)]
    if problems:
        raise UsageError(*problems)
    for name, module in found:
        _warn_of_frozen(name, module)
    return _exchanged(model, theirs, inplace)


def from_torch_ao(model: nn.Module, inplace: bool = False) -> nn.Module:
    """`model` with fusecli.nn's containers in the place of torch.ao.nn.intrinsic's: the way back.

    inplace   change `model` itself; else a copy is changed, which shares nothing with it

    Float containers only; those that fusecli has no class for (LinearTanh, ConvAdd2d, ...) stay as they are.
    Raises UsageError, and changes nothing, for a model that torch.ao has prepared or quantized.
    """
    ours = {theirs: mine for mine, theirs in _classes("from_torch_ao").items()}
    problems = list(_past_floats(model))
    if problems:
        raise UsageError(*problems)
    return _exchanged(model, ours, inplace)


def _classes(caller: str) -> dict[type[nn.Module], type[nn.Module]]:
    """fusecli's containers, and torch.ao's of the same name."""
    intrinsic = _intrinsic(caller)
    return {mine: getattr(intrinsic, mine.__name__) for mine in _SHARED}


def _intrinsic(caller: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torch.ao.nn.intrinsic as intrinsic
        except ImportError as error:
            what = f"this torch has no torch.ao.nn.intrinsic ({error})"
            fix = "install a torch that still has it, or stay with fusecli.nn's containers: they need none"
            raise UsageError(Problem(what, f"fusecli.interop.torch_ao.{caller}", fix)) from None
    return intrinsic


def _exchanged(
    model: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]], inplace: bool
) -> nn.Module:
    """The class alone is changed, as torch's own parametrize does it: whoever holds the module, under however
    many names, keeps it, with its hooks and the handles to remove them."""
    changed = model if inplace else duplicate(model)
    for module in changed.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return changed


def _refusals(name: str, container: nn.Module) -> Iterator[Problem]:
    """What torch.ao would refuse: its constructors the types, its fuse_modules_qat the norm."""
    assert isinstance(container, fused.FusedModule)
    where, kind = name or "the model itself", type(container).__name__
    for child, known in zip(container, container.members, strict=True):
        found = type_before_parametrizations(child)
        if found is not known:
            what = f"{kind} holds a {found.__name__}; torch.ao takes {known.__name__} and no subclass of it"
            fix = "leave this group out when fusing, or replace the module by torch's own"
            yield Problem(what, where, fix)
    for norm in _inner_norms(container):
        if norm.weight is None:
            yield Problem(f"the norm in {kind} has no gamma and beta", where, _WHOLE_NORM)
        if norm.running_mean is None:
            yield Problem(f"the norm in {kind} has no running statistics", where, _WHOLE_NORM)


def _warn_of_frozen(name: str, container: nn.Module) -> None:
    if container.training and any(not norm.training for norm in _inner_norms(container)):
        _log.warning(
            "%s: its norm is in eval mode; torch.ao's prepare_qat makes it learn again, unless "
            "torch.ao.nn.intrinsic.qat.freeze_bn_stats is applied afterwards",
            name or "the model itself",
        )


def _inner_norms(container: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The norm behind a layer; that of a BNReLU is a module of its own to torch.ao too."""
    behind = list(container.children())[1:]
    return [norm for norm in behind if isinstance(norm, nn.modules.batchnorm._BatchNorm)]


def _past_floats(model: nn.Module) -> Iterator[Problem]:
    prepared, quantized = _outermost(model, _PREPARED), _outermost(model, _QUANTIZED)
    if prepared:
        yield Problem(f"torch.ao has prepared this model: {_listed(prepared)}", fix=_SAVE)
    if quantized:
        yield Problem(f"torch.ao has quantized this model: {_listed(quantized)}", fix=_SAVE_EARLIER)


def _outermost(model: nn.Module, origins: tuple[str, ...]) -> list[str]:
    """The modules of these origins that are in none of them, each with its class."""
    found: list[str] = []
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue  # named_modules lists what is inside a module right behind it
        if any(_comes_from(kind, origins) for kind in type(module).__mro__):
            inside = f"{name}." if name else ""
            found.append(f"{name or 'the model itself'} ({type(module).__name__})")
    return found


def _comes_from(kind: type, origins: tuple[str, ...]) -> bool:
    return kind.__module__.startswith(origins) and kind.__name__ not in _FUNCTIONAL


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
