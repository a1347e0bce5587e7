"""The samples that a spec describes: seeded random tensors, or tensors of a safetensors file."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fusecli.checkpoint import Checkpoint
from fusecli.errors import Problem, UsageError
from fusecli.outcome import LedgerEntry
from fusecli.sample import Sample, tensors_in
from fusecli.spec import InputSpec, Spec
from fusecli.spec.inputs import tensors_of

_DTYPE = "float32"
_FLOATING = ("float16", "bfloat16", "float32", "float64")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def samples_of(spec: Spec, seed: int, count: int) -> list[Sample]:
    """`count` samples, or one where every input comes from a file; raises UsageError with all problems."""
    if not spec.inputs:
        fix = "give --input 1x3x224x224 for each argument, or add inputs: [{shape: [1, 3, 224, 224]}]"
        raise UsageError(Problem("there is a model, but no inputs to run it on", spec.where(()), fix))
    drawn = any(entry.file is None for entry in tensors_of(spec.inputs))
    return [_sample(spec, seed + number) for number in range(count if drawn else 1)]


def as_computed(spec: Spec, checkpoint: Checkpoint) -> tuple[Spec, list[LedgerEntry]]:
    """The spec with a dtype for every random input that has none: the one that the model computes in. And
    what the report says of it, where that is not what people expect.
    """
    dtype = computing_dtype(checkpoint)
    drawn = [*tensors_of(spec.inputs), *tensors_of(spec.quantize.calibrate)]
    if dtype == _DTYPE or all(entry.file or entry.dtype for entry in drawn):
        return spec, []
    quantize = spec.quantize.model_copy(update={"calibrate": _given(spec.quantize.calibrate, dtype)})
    spec = spec.model_copy(update={"inputs": _given(spec.inputs, dtype), "quantize": quantize})
    what = f"random inputs are {dtype}, as most of the model's parameters; a dtype in the spec would win"
    return spec, [LedgerEntry("assumed", "inputs", what)]


def computing_dtype(checkpoint: Checkpoint) -> str:
    """The floating dtype of most parameters of a checkpoint; float32 where there are none."""
    sizes: Counter[str] = Counter()
    for name, tensor in checkpoint.tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype in _FLOATING and not name.endswith(STATISTICS):
            sizes[dtype] += prod(tensor.shape)
    return max(sizes, key=lambda dtype: sizes[dtype], default=_DTYPE)


def _given(entries: Any, dtype: str) -> Any:
    def one(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {name: one(item) for name, item in entry.items()}
        if not isinstance(entry, InputSpec):
            return _given(entry, dtype)
        return entry if entry.file or entry.dtype else entry.model_copy(update={"dtype": dtype})

    return tuple(map(one, entries))


def dynamic_axes(spec: Spec, sample: Sample) -> list[tuple[int, ...] | None]:
    """For each tensor of the sample the axes that the spec says are dynamic; None: it does not say.

    Raises UsageError for an axis that a tensor of a file has not got.
    """
    entries, tensors = list(tensors_of(spec.inputs)), tensors_in((sample.args, dict(sample.kwargs)))
    for entry, tensor in zip(entries, tensors, strict=False):
        if beyond := [axis for axis in entry.dynamic or () if axis >= tensor.ndim]:
            what = f"{entry.file}:{entry.key} has no axis {beyond[0]}, its shape is {list(tensor.shape)}"
            raise UsageError(Problem(what, spec.where(("inputs",)), "axes are counted from 0"))
    return [entry.dynamic for entry in entries]


def _sample(spec: Spec, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    args, kwargs = [], {}
    problems: list[Problem] = []
    for number, entry in enumerate(spec.inputs):
        try:
            value = _value(entry, generator, spec.folder, spec.where(("inputs", number)))
        except UsageError as error:
            problems += error.problems
            continue
        if isinstance(entry, InputSpec) and entry.name:
            kwargs[entry.name] = value
        else:
            args.append(value)
    if problems:
        raise UsageError(*problems)
    return Sample(tuple(args), kwargs)


def _value(entry: Any, generator: torch.Generator, folder: Path, where: str) -> Any:
    if isinstance(entry, dict):
        return {name: _value(item, generator, folder, where) for name, item in entry.items()}
    if not isinstance(entry, InputSpec):
        return tuple(_value(item, generator, folder, where) for item in entry)
    return _from_file(entry, folder, where) if entry.file else _drawn(entry, generator, where)


def _drawn(entry: InputSpec, generator: torch.Generator, where: str) -> Tensor:
    shape, dtype = entry.shape or (), getattr(torch, entry.dtype or _DTYPE)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not dtype.is_floating_point:
        if entry.range is None:
            fix = "add range: [0, 1000], the first value past the end is not drawn"
            raise UsageError(Problem(f"an {entry.dtype} input needs a range to draw from", where, fix))
        first, end = map(int, entry.range)
        return torch.randint(first, end, shape, generator=generator, dtype=torch.int64).to(dtype)
    if entry.range is None:
        return torch.randn(shape, generator=generator).to(dtype)
    low, high = entry.range
    return (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)


def _from_file(entry: InputSpec, folder: Path, where: str) -> Tensor:
    return read_tensor(entry.file or "", entry.key or "", folder, where)


def read_tensor(name: str, key: str, folder: Path, where: str) -> Tensor:
    """A tensor of a safetensors file relative to `folder`; raises UsageError naming those that it has."""
    try:
        with safe_open(folder / name, framework="pt") as file:
            if key not in file.keys():  # noqa: SIM118  (a safe_open handle is no mapping)
                names = ", ".join(sorted(file.keys())[:5])
                raise UsageError(Problem(f"{name} has no tensor '{key}'", where, f"it has {names}"))
            tensor: Tensor = file.get_tensor(key)
            return tensor.clone()
    except (OSError, SafetensorError) as error:
        fix = "give a safetensors file, relative to the spec"
        raise UsageError(Problem(f"{name} cannot be read: {error}", where, fix)) from error
