"""`inspect` on a file: what is in a checkpoint, and what fusing it would take. Nothing in it is executed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fusecli.artifact import manifest_of
from fusecli.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from fusecli.checkpoint.qat_layout import qat_layout
from fusecli.commands.draft import draft_spec
from fusecli.commands.pairs import channels_of, pairs_by_name, pairs_by_order
from fusecli.contents import ArtifactFacts, Contents, DtypeFacts, ModuleFacts, NormFacts, Role, TensorFacts
from fusecli.outcome import FileFacts
from fusecli.pipeline import facts
from fusecli.rewrite import MANIFEST_KEY

_STATISTICS = {"running_mean", "running_var"}
# torch.nn.utils.weight_norm and spectral_norm; the newer parametrize keeps modules of its own.
_REPARAMETRIZED = ("weight_g", "weight_v", "weight_orig")
_PARAMETRIZATIONS = "parametrizations"
_NUMBER = re.compile(r"(\d+)")


def inspect_file(path: Path, key: str | None = None) -> Contents:
    """The facts; `key` chooses one of several state dicts in the file.

    Raises UsageError and UnsafeError as open_checkpoint does, without --allow-pickle.
    """
    with open_checkpoint(path, key=key) as checkpoint:
        modules, alphabetical = _modules(checkpoint), _is_alphabetical(checkpoint)
        if alphabetical:
            modules.sort(key=lambda module: _natural(module.path))
        artifact = _artifact(checkpoint)
        guesses = pairs_by_name(modules) if alphabetical else pairs_by_order(modules)
        candidates = tuple(guesses) if artifact is None else ()
        return Contents(
            file=_file(checkpoint),
            shards=max(0, len(checkpoint.files) - 1),
            nesting=checkpoint.nesting,
            prefixes=checkpoint.prefixes,
            alphabetical=alphabetical,
            modules=tuple(modules),
            dtypes=_dtypes(checkpoint.tensors.values()),
            norms=tuple(_norm(checkpoint, module) for module in modules if module.role is Role.NORM),
            ties=checkpoint.ties,
            others=tuple(sorted(map(str, checkpoint.others))),
            artifact=artifact,
            candidates=candidates,
            draft=draft_spec(checkpoint.nesting, modules, candidates, ordered=not alphabetical),
        )


def _file(checkpoint: Checkpoint) -> FileFacts:
    found = facts.input_facts(checkpoint)
    try:
        layout = qat_layout({name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    except ValueError:  # two names that would be one: fuse says so
        layout = None
    if layout is None:
        return found
    notice = f"trained with simulated quantization ({layout.kind}): 'fusecli fuse' reads it as a float model"
    return replace(found, notices=(*found.notices, notice))


def _modules(checkpoint: Checkpoint) -> list[ModuleFacts]:
    tensors: dict[str, list[TensorFacts]] = {}
    for name, stored in checkpoint.tensors.items():
        path, _, local = name.rpartition(".")
        tensors.setdefault(path, []).append(TensorFacts(local, _name(stored.dtype), stored.shape))
    for held in tensors.values():
        held.sort(key=lambda tensor: tensor.name != "weight")  # what a layer is known by comes first
    return [ModuleFacts(path, _role(path, held), tuple(held)) for path, held in tensors.items()]


def _role(path: str, tensors: Iterable[TensorFacts]) -> Role:
    axes = {tensor.name: len(tensor.shape) for tensor in tensors}
    if axes.keys() >= _STATISTICS:
        return Role.NORM
    if any(name in axes for name in _REPARAMETRIZED) or _PARAMETRIZATIONS in path.split("."):
        return Role.REPARAMETRIZED
    if axes.keys() <= {"weight", "bias"} and "weight" in axes:
        return Role.LAYER if axes["weight"] >= 2 else Role.SCALE
    return Role.OTHER


def _is_alphabetical(checkpoint: Checkpoint) -> bool:
    """Whether the keys were sorted when the file was written, as safetensors does within each dtype.

    A state dict as torch makes it is never sorted: there a norm's weight comes before its bias.
    """
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, stored in checkpoint.tensors.items():
        by_dtype.setdefault(stored.dtype, []).append(name)
    return all(names == sorted(names) for names in by_dtype.values())


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorts layer10 behind layer9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBER.split(path)]


def _dtypes(tensors: Iterable[StoredTensor]) -> tuple[DtypeFacts, ...]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for stored in tensors:
        counts[_name(stored.dtype)] += 1
        sizes[_name(stored.dtype)] += stored.nbytes
    return tuple(DtypeFacts(dtype, counts[dtype], size) for dtype, size in sizes.most_common())


def _norm(checkpoint: Checkpoint, module: ModuleFacts) -> NormFacts:
    tensors = {t.name: checkpoint.tensors[_joined(module.path, t.name)].load() for t in module.tensors}
    mean, variance = tensors["running_mean"], tensors["running_var"]
    return NormFacts(
        path=module.path,
        channels=channels_of(module),
        affine="weight" in tensors,
        untrained=bool((mean == 0).all()) and bool((variance == 1).all()),
        flaws=tuple(_flaws(tensors)),
    )


def _flaws(tensors: dict[str, Tensor]) -> Iterable[str]:
    variance = tensors["running_var"]
    if len({tensors[name].shape for name in ("running_mean", "running_var")}) > 1 or variance.dim() != 1:
        yield "running_mean and running_var are not one number for each channel"
    for name, tensor in tensors.items():
        if broken := int((~torch.isfinite(tensor)).sum()):
            yield f"{name} is not finite in {broken} of {tensor.numel()} channels"
    if not variance.is_complex() and (negative := int((variance < 0).sum())):
        yield f"running_var is negative in {negative} of {variance.numel()} channels"


def _artifact(checkpoint: Checkpoint) -> ArtifactFacts | None:
    if MANIFEST_KEY not in checkpoint.metadata:
        return None
    manifest = manifest_of(checkpoint)
    return ArtifactFacts(
        mode=manifest.mode,
        rules=dict(Counter(group.rule for group in manifest.groups).most_common()),
        groups=tuple(group.modules for group in manifest.groups),
        input_sha256=manifest.input_sha256,
        spec_sha256=manifest.spec_sha256,
        versions=manifest.versions,
    )


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
