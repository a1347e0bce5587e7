"""What a module is to a rule: one word per module, and whether its class is known to keep its promise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fusecli.nn import FusedModule

# The classes whose forward is known. Any other class, a subclass included, is believed only after a probe.
EXACT = frozenset(
    {
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.Linear, nn.ReLU),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    }
)
# Classes that return their input at inference: a group may list them, nothing happens there. A subclass may
# be a dropout that never stops.
NOTHING = frozenset(
    {
        *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.AlphaDropout, nn.FeatureAlphaDropout),
    }
)
BATCH_DEPENDENT = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
LAYER_KINDS = frozenset({"conv", "conv_transpose", "linear"})
NORM_KINDS = frozenset({"norm", "norm_with_activation"})
FOLDABLE = LAYER_KINDS | NORM_KINDS


_KINDS: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (FusedModule, "fused"),
    (_ConvTransposeNd, "conv_transpose"),
    (_ConvNd, "conv"),
    (nn.Linear, "linear"),
    (nn.ReLU, "relu"),
    (BATCH_DEPENDENT, "batch_dependent"),
    (_NormBase, "norm"),
)


def kind_of(module: nn.Module, treated_as: type | None = None) -> str:
    """fused, conv, conv_transpose, linear, norm, norm_with_activation, batch_dependent, relu, nothing or
    other; `treated_as` is the class whose kind the user wants for this one."""
    kind = _kind_of_class(treated_as or type(module))
    if kind in ("nothing", "relu") and treated_as is None and is_patched(module):
        return "other"  # no probe is made of those, their classes are believed
    if kind == "other" and treated_as is None and is_norm(module):
        kind = "norm"
    if kind == "norm" and any(child is not None for child in module._modules.values()):
        return "norm_with_activation"
    return kind


@cache
def _kind_of_class(cls: type) -> str:
    if cls in NOTHING:
        return "nothing"
    return next((kind for base, kind in _KINDS if issubclass(cls, base)), "other")


def is_norm(module: nn.Module) -> bool:
    """BatchNorm and all that carry running statistics and an eps like it (FrozenBatchNorm2d too)."""
    if isinstance(module, _NormBase):
        return True
    # Asked name by name: the buffers of a scripted module are no dict.
    return all(name in module._buffers for name in ("running_mean", "running_var")) and hasattr(module, "eps")


def is_exact(module: nn.Module) -> bool:
    """Whether its forward is known: that of its class, of which nothing was put on the instance."""
    return type(module) in EXACT and not is_patched(module)


def is_identity(module: nn.Module) -> bool:
    """Whether it is an nn.Identity, and still gives what it takes."""
    return type(module) is nn.Identity and not is_patched(module)


def is_patched(module: nn.Module) -> bool:
    """Whether a method of its own stands before one of its class: `forward`, or any that it may call."""
    cls: type = type(module)
    return not _methods(cls).isdisjoint(vars(module))


@cache
def _methods(cls: type) -> frozenset[str]:
    return frozenset(name for name in dir(cls) if callable(getattr(cls, name, None)))


def norms(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every norm layer of a model with its path: the foldable ones and those that depend on the batch."""
    for path, module in modules.items():
        if is_norm(module) or isinstance(module, BATCH_DEPENDENT):
            yield path, module


def without_statistics(norm: nn.Module) -> tuple[str, str] | None:
    """Reason code and sentence for a norm that computes its statistics from what it is given; else None."""
    if isinstance(norm, BATCH_DEPENDENT):
        return "batch-dependent", f"{type(norm).__name__} normalises by the statistics of each input"
    buffers = dict(norm.named_buffers(recurse=False))  # those of a scripted module are no dict
    if not {"running_mean", "running_var"} <= buffers.keys():
        if isinstance(norm, _InstanceNorm):
            return (
                "batch-dependent",
                "InstanceNorm without running statistics normalises each input by its own",
            )
        return "no-statistics", "the norm keeps no running statistics (track_running_stats=False)"
    return None
