"""Batches of inputs: what int8 is calibrated on, and what it is compared on."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusecli.blame import forward_failed
from fusecli.errors import Problem, UsageError
from fusecli.int8.comparison import by_rows, single
from fusecli.int8.torchao import quiet
from fusecli.outcome import LedgerEntry
from fusecli.sample import Sample, tensors_in
from fusecli.source.samples import read_tensor, samples_of
from fusecli.spec import Spec
from fusecli.spec.inputs import tensors_of


@dataclass(frozen=True)
class Batches:
    """Forward calls, the labels of their rows where a file holds them, and where it all comes from.

    where  the place in the spec that says so
    """

    samples: Sequence[Sample]
    labels: Tensor | None
    said: str
    random: bool
    where: str = ""


def evaluation(spec: Spec, seed: int) -> Batches:
    """What float and int8 are compared on: the inputs of the spec.

    Raises UsageError where a threshold asks for labels, and there are none.
    """
    given = _batches(spec, seed)
    if given.labels is None and spec.quantize.threshold.accuracy_drop is not None:
        fix = "add labels to inputs: {file: heldout.safetensors, key: images, labels: labels}"
        where = spec.where(("quantize", "threshold", "accuracy_drop"))
        raise UsageError(Problem("accuracy_drop needs labels, and the inputs have none", where, fix))
    return given


def calibration(spec: Spec, seed: int) -> Batches:
    """What the ranges are taken from: the spec's calibrate, else its inputs."""
    chosen = spec.quantize.calibrate
    if not chosen:
        return _batches(spec, seed)
    given = spec.model_copy(update={"inputs": chosen})
    return _batches(given, seed, spec.where(("quantize", "calibrate")))


def _batches(spec: Spec, seed: int, where: str = "") -> Batches:
    where = where or spec.where(("inputs",))
    samples = samples_of(spec, seed, spec.verify.samples)
    entries = list(tensors_of(spec.inputs))
    random = any(entry.file is None for entry in entries)
    named = next((entry for entry in entries if entry.labels), None)
    rows = _rows(samples[0])
    if rows == 0:
        raise UsageError(Problem("there are no samples in it", where, "give one at least"))
    if not all(bool(tensor.isfinite().all()) for sample in samples for tensor in _tensors(sample)):
        raise UsageError(Problem("it has values that are not finite", where, "look at what is in the file"))
    labels = None
    if named is not None:
        labels = read_tensor(named.file or "", named.labels or "", spec.folder, where)
        _require_classes(labels, rows, where)
        labels = labels.repeat(len(samples))  # of a file beside random inputs: each sample has its rows
    if not random:
        samples = [part for sample in samples for part in _split(sample, spec.quantize.batch)]
    files = ", ".join(dict.fromkeys(f"{entry.file}:{entry.key}" for entry in entries if entry.file))
    said = f"{len(samples)} random inputs" if random else f"{rows} samples of {files}"
    return Batches(samples, labels, said, random, where)


def _require_classes(labels: Tensor, rows: int, where: str) -> None:
    fix = "give one class for each sample, a whole number"
    if labels.shape != (rows,):
        raise UsageError(Problem(f"{list(labels.shape)} labels for {rows} samples", where, fix))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        dtype = str(labels.dtype).removeprefix("torch.")
        raise UsageError(Problem(f"the labels are {dtype}, and no classes", where, fix))


def _rows(sample: Sample) -> int:
    """The size at dim 0 of the first tensor that has one."""
    tensors = [tensor for tensor in _tensors(sample) if tensor.ndim]
    return len(tensors[0]) if tensors else 1


def _tensors(sample: Sample) -> list[Tensor]:
    return tensors_in((sample.args, dict(sample.kwargs)))


def _split(sample: Sample, batch: int) -> Iterator[Sample]:
    """The sample in batches of so many rows; a tensor of another size at dim 0 is the same for all."""
    rows = _rows(sample)
    for start in range(0, rows, batch):
        end = min(start + batch, rows)

        def part(tensor: Tensor, start: int = start, end: int = end) -> Tensor:
            return tensor[start:end] if tensor.ndim and len(tensor) == rows else tensor

        yield sample.mapped(part)


@torch.no_grad()
def outputs(model: Callable[..., Any], sample: Sample) -> list[Tensor]:
    inputs = sample.copy()
    return tensors_in(model(*inputs.args, **inputs.kwargs))


def require_running(model: Callable[..., Any], given: Batches) -> None:
    """Raises UsageError where the model, or a graph of it, does not take a batch of these sizes."""
    shapes = set()
    for sample in given.samples:
        shape = tuple(tensor.shape for tensor in _tensors(sample))
        if shape in shapes:
            continue
        shapes.add(shape)
        try:
            with quiet():
                outputs(model, sample)
        except Exception as error:  # whatever somebody's forward may raise
            fix = "give sizes and dtypes that it takes, in calibrate and inputs alike, batch by batch"
            raise UsageError(forward_failed(error, given.where, fix)) from None


def require_scores(model: Callable[..., Any], given: Batches) -> None:
    """Raises UsageError where there are labels, and they are no classes of what the model gives."""
    if given.labels is None:
        return
    sample, labels = given.samples[0], given.labels.long()
    found = scores(model, sample)
    if found is None or found.ndim != 2 or len(found) != _rows(sample):
        shape = "none" if found is None else str(list(found.shape))
        what = f"there are labels, but the model gives no scores [n, classes] (its first tensor: {shape})"
        raise UsageError(Problem(what, given.where, "take labels out of the inputs"))
    low, high, classes = int(labels.min()), int(labels.max()), found.shape[1]
    if low < 0 or high >= classes:
        what = f"the labels go from {low} to {high}, and the model has {classes} classes"
        raise UsageError(Problem(what, given.where, f"give labels from 0 to {classes - 1}"))


def require_measure(model: Callable[..., Any], given: Batches, spec: Spec) -> None:
    """Raises UsageError where a cosine is asked for, and a row of an output is one number."""
    if spec.quantize.threshold.cosine is None:
        return
    sample = given.samples[0]
    leaves = (leaf for leaf in outputs(model, sample) if leaf.is_floating_point() and leaf.numel())
    if any(single(by_rows(leaf, sample)) for leaf in leaves):
        what = "an output has one number for each sample, and the cosine of one number is its sign"
        where = spec.where(("quantize", "threshold", "cosine"))
        raise UsageError(Problem(what, where, "ask for sqnr instead: {sqnr: 20}"))


def scores(model: Callable[..., Any], sample: Sample) -> Any:
    return next((leaf for leaf in outputs(model, sample) if leaf.is_floating_point()), None)


def random_ledger(given: Batches) -> list[LedgerEntry]:
    """Random inputs calibrate nothing."""
    if not given.random:
        return []
    what = "random numbers calibrate nothing: the ranges are those of noise; give a file of real inputs"
    return [LedgerEntry("calibration", "quantize.calibrate", what)]


def judged_ledger(calibrated: Batches, given: Batches) -> list[LedgerEntry]:
    """What the comparison of float and int8 cannot show, for what it is made on."""
    if given.random:
        what = "float and int8 are compared on random numbers: how like they are on real inputs is not shown"
    elif fingerprint(calibrated.samples) == fingerprint(given.samples):
        what = (
            f"calibrated and judged on the same data ({given.said}): how int8 does on inputs that it was not "
            "calibrated on is not shown; give calibrate a file of its own"
        )
    else:
        return []
    return [LedgerEntry("comparison", "inputs", what)]


def undecided(calibrated: Batches, given: Batches) -> str:
    """Why no threshold can decide on these, '' where one can."""
    if calibrated.random:
        return f"it is calibrated on {calibrated.said}, and noise says nothing of the ranges of real inputs"
    if given.random:
        return f"it is judged on {given.said}, and noise says nothing of how int8 does on real inputs"
    return ""


def fingerprint(samples: Sequence[Sample]) -> str:
    """sha256 of the inputs, batch by batch: their dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for sample in samples:
        for tensor in _tensors(sample):
            digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
            dense = tensor.detach().contiguous()
            if dense.nbytes:
                digest.update((ctypes.c_char * dense.nbytes).from_address(dense.data_ptr()))
        digest.update(b";")
    return digest.hexdigest()
