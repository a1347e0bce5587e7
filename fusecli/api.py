"""The Python API: what `import fusecli` offers, on models in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fusecli.artifact import load_fused
from fusecli.commands.in_memory import (
    AdapterFile,
    Groups,
    fuse_in_memory,
    fused_by_name,
    plan_in_memory,
    spec_of,
    verify_in_memory,
)
from fusecli.consent import Consent
from fusecli.errors import Problem, UnsafeError
from fusecli.outcome import Outcome, Proposal, Verdict
from fusecli.qat import prepare_qat
from fusecli.sample import Sample
from fusecli.spec import Spec, spec_from_mapping
from fusecli.spec.model import Shared, Target

__all__ = [
    "fuse",
    "fuse_modules",
    "fuse_modules_qat",
    "load_fused",
    "load_int8",
    "plan",
    "prepare_qat",
    "verify",
]


def fuse_modules(
    model: nn.Module,
    modules_to_fuse: Groups,
    inplace: bool = False,
    fuser_func: Callable[..., Sequence[nn.Module]] | None = None,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """`model` with the groups fused, in eval mode: a drop-in for torch.ao.quantization.fuse_modules.

    modules_to_fuse          one list of module names, or a list of such lists
    inplace                  change `model` itself; else a copy is changed, which shares nothing with it
    fuser_func               replaces the rules: called as (modules, is_qat, additional_fuser_method_mapping),
                             it returns as many modules, which take the places of those it was given
    fuse_custom_config_dict  {"additional_fuser_method_mapping": {(Conv2d, MyNorm): fuser}}, each fuser called
                             as (is_qat, *modules)

    Where torch.ao leaves a model half fused, this changes nothing: all groups are checked first. Nothing is
    verified; `fuse` does that. What the model holds a second time, outside of its module tree (a list of its
    layers), stays as it was; that is logged. Raises UsageError for names that do not exist, RefusedError for
    groups that cannot be fused.
    """
    return fused_by_name(model, modules_to_fuse, inplace, fuser_func, fuse_custom_config_dict, "folded")


def fuse_modules_qat(
    model: nn.Module,
    modules_to_fuse: Groups,
    inplace: bool = False,
    fuser_func: Callable[..., Sequence[nn.Module]] | None = None,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """`model` with the groups in containers (fusecli.nn.ConvBnReLU2d, ...), to be trained with simulated
    quantization: a drop-in for torch.ao.quantization.fuse_modules_qat, with its child layout.

    Arguments as for `fuse_modules`. Nothing is folded: the norms go on learning. The model stays in train
    mode; raises RefusedError for members that are in eval mode, and for what no container takes.
    """
    return fused_by_name(model, modules_to_fuse, inplace, fuser_func, fuse_custom_config_dict, "qat")


def fuse(
    model: nn.Module,
    inputs: Any,
    *,
    groups: Groups | None = None,
    spec: Spec | str | Path | Mapping[str, Any] | None = None,
    discover: bool | None = None,
    target: Target | None = None,
    shared: Shared | None = None,
    qat: bool | None = None,
    bake: bool | None = None,
    adapter: AdapterFile | None = None,
    allow_code: Iterable[str] = (),
    assume_same_path: bool | None = None,
) -> Outcome:
    """Fuses a copy of `model` and proves it on `inputs`; `outcome.model` is that copy, None if it is wrong.

    inputs    a tensor, a tuple of positional arguments, or a dict of keyword arguments
    groups    as for fuse_modules; None: those of the spec
    spec      a Spec, a path or a dict: groups, extra mappings, exclude and the seed are taken from it
    discover  also fuse what the dataflow offers, for `target` "inference" or "quant"; None: as the spec says
    shared    "clone": a module or weight with several names is given a copy for each one that can be folded
    qat       as fuse_modules_qat does: containers that are trained; verified in train mode too
    bake      layers whose weight is computed (weight_norm, a pruning mask) are made plain, then folded
    adapter   a LoRA adapter that is added first: its file, or {"file": ..., "scale": ...} as in a spec
    assume_same_path  every input goes through the modules that ran, where others stand beside them to choose
              from; None: as the spec says
    allow_code  packages and files whose code the spec may name, besides those that the environment and the
                project's pyproject.toml allow; a call never asks

    The outcome holds the same facts as the JSON report of `fusecli fuse`. A group that cannot be fused is in
    `outcome.refused`, and then nothing is fused. Raises UsageError for names that do not exist.
    """
    options = {"discover": discover, "target": target, "shared": shared, "qat": qat, "bake": bake}
    read = spec_of(spec, groups, adapter, assume_same_path=assume_same_path, **options)
    return fuse_in_memory(model, Sample.of(inputs), read, Consent.gather(allow_code))


def plan(
    model: nn.Module,
    inputs: Any,
    *,
    target: Target = "inference",
    exclude: Iterable[str] = (),
    bake: bool = False,
    assume_same_path: bool = False,
) -> Proposal:
    """What can be fused in `model`, as a run on `inputs` (as for `fuse`) shows it; it is not changed.

    target   "inference": norms are folded; "quant": a ReLU goes into a container too
    exclude  patterns of names that are left alone
    bake     layers whose weight is computed are made plain, then folded
    assume_same_path  as for `fuse`

    Raises UsageError where the model does not run on the inputs.
    """
    asked: dict[str, Any] = {"discover": True, "target": target, "exclude": list(exclude), "bake": bake}
    asked["verify"] = {"assume_same_path": assume_same_path}
    return plan_in_memory(model, Sample.of(inputs), spec_from_mapping(asked, where="fusecli.plan"))


def verify(
    original: nn.Module,
    fused: nn.Module,
    inputs: Any,
    *,
    seed: int = 0,
    adapter: AdapterFile | None = None,
    assume_same_path: bool = False,
) -> Verdict:
    """Whether `fused` computes what `original` does, on `inputs` (as for `fuse`), both in eval mode.

    A model that fusecli fused or loaded carries the names of its groups: each is judged by itself, and its
    weights against the fold of the original's. Of any other model only the outputs can be compared.
    With an `adapter` (as for `fuse`) it is the original with that beside its layers; `assume_same_path` as
    there. Neither model is changed. Raises UsageError where `original` does not run on the inputs.
    """
    read = spec_of({"verify": {"seed": seed, "assume_same_path": assume_same_path}}, adapter=adapter)
    return verify_in_memory(original, fused, Sample.of(inputs), read)


def load_int8(path: str | Path, *, allow_pickle: bool = False) -> nn.Module:
    """The model of a .pt2 file that `fusecli quantize` wrote, called like the float model it was made from.

    torch.export.load runs code that a file names: `allow_pickle` says that you trust it. torchao is not
    needed. Raises UnsafeError without that word, or for what is no such file.
    """
    if not allow_pickle:
        fix = "pass allow_pickle=True if you trust the file"
        raise UnsafeError(Problem("torch.export.load runs code that a .pt2 file names", str(path), fix))
    from fusecli.int8.saved import load  # with torch.export, half a second that nothing else needs

    return load(Path(path))
