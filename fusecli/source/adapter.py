"""A LoRA adapter as a file: its pairs of tensors by the layer they belong to, and the scale of each."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from fusecli.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from fusecli.errors import FusecliError, Problem, RefusedError, UsageError
from fusecli.nn import Adapted, adapt, computed_tensor
from fusecli.outcome import LedgerEntry
from fusecli.rewrite import ModuleTree
from fusecli.source.adapter_config import CONFIG, configured, require_plain
from fusecli.spec.adapter import Adapter as AdapterSpec
from fusecli.spec.names import NameTree

_PEFT = "base_model.model."
_NAME = re.compile(r"(?P<path>.+)\.(?P<side>lora_[AB])(\.(?P<adapter>[^.]+)\.weight|\.weight)?", re.DOTALL)
_ROUNDED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_NAMES = 3
# What is in the file of an adapter that is no sum of the base and a product.
_OTHERS = {
    "lora_magnitude_vector": "DoRA scales the sum by its own norm",
    "lora_embedding_A": "it adapts an embedding",
    "lora_embedding_B": "it adapts an embedding",
    "modules_to_save": "it replaces whole modules",
}


@dataclass(frozen=True)
class Pair:
    """lora_A and lora_B of one layer."""

    down: StoredTensor
    up: StoredTensor


@dataclass(frozen=True)
class Adapter:
    """An open adapter; `strength` is the scale itself, or what is divided by the rank, or by its root."""

    path: Path
    sha256: str
    pairs: Mapping[str, Pair]
    strength: float
    divided: str = ""  # "", "rank" or "root"
    rank: int | None = None  # that every layer is said to have
    peft: bool = False  # whether PEFT has written it

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """By the names that they have in an adapted model."""
        return {
            f"{path}.{name}": tensor
            for path, pair in self.pairs.items()
            for name, tensor in zip(Adapted.SOURCES, (pair.down, pair.up), strict=True)
        }

    @property
    def entry(self) -> LedgerEntry:
        what = f"{len(self.pairs)} layers have it added to their weights (sha256 {self.sha256[:12]}...)"
        return LedgerEntry("adapter", str(self.path), what)

    def scale(self, rank: int) -> float:
        return self.strength / {"": 1.0, "rank": rank, "root": math.sqrt(rank)}[self.divided]


def protected(spec: AdapterSpec, folder: Path) -> list[Path]:
    """The files that are read for it, and have to stay as they are."""
    file = folder / spec.file
    return [file, file.parent / CONFIG]


def open_adapter(spec: AdapterSpec, folder: Path, where: str) -> Adapter:
    """The adapter that a spec names, its tensors not read yet.

    Raises UsageError for a file that is no LoRA adapter, or whose scale nobody says; RefusedError for one
    whose layers are something else than W + scale B A; UnsafeError as open_checkpoint does.
    """
    try:
        checkpoint = open_checkpoint(folder / spec.file)
    except FusecliError as error:
        problems = (Problem(f"the adapter: {p.what}", f"{where}: {p.where}", p.fix) for p in error.problems)
        raise type(error)(*problems) from error
    beside = checkpoint.path.parent
    peft = (beside / CONFIG).is_file() or any(name.startswith(_PEFT) for name in checkpoint.tensors)
    pairs = _pairs(checkpoint)
    found = Adapter(checkpoint.path, checkpoint.sha256(), pairs, spec.scale or 0.0, peft=peft)
    if spec.scale is None and spec.alpha is None:
        strength = configured(beside, where)
        return replace(found, strength=strength.alpha, divided=strength.divided, rank=strength.rank)
    require_plain(beside)
    return found if spec.alpha is None else replace(found, strength=spec.alpha, divided="rank")


def _pairs(checkpoint: Checkpoint) -> dict[str, Pair]:
    where = str(checkpoint.path)
    sides: dict[str, dict[str, StoredTensor]] = {}
    problems: list[Problem] = []
    adapters: set[str | None] = set()
    for name, tensor in checkpoint.tensors.items():
        match = _NAME.fullmatch(name.removeprefix(_PEFT))
        if match is None or match["path"].endswith(".modules_to_save"):
            raise _no_pair(name, where)
        adapters.add(match["adapter"])
        held = sides.setdefault(match["path"], {})
        if match["side"] in held:
            fix = "save one adapter to a file"
            problems.append(Problem(f"{match['path']} has two tensors {match['side']}", where, fix))
        if tensor.dtype not in _ROUNDED:
            problems.append(Problem(f"{name} is {tensor.dtype}, not a floating-point tensor", where))
        held[match["side"]] = tensor
    for path, held in sides.items():
        for name in (name for name in Adapted.SOURCES if name not in held):
            problems.append(Problem(f"{path} has {next(iter(held))} and no {name}", where, "save both"))
    if len(adapters) > 1:
        told = ", ".join(sorted(map(str, adapters)))
        problems.append(Problem(f"it holds several adapters: {told}", where, "save one adapter to a file"))
    if not sides:
        problems.append(Problem("there is no tensor in this adapter", where))
    if problems:
        raise UsageError(*problems)
    return {path: Pair(held["lora_A"], held["lora_B"]) for path, held in sides.items()}


def _no_pair(name: str, where: str) -> FusecliError:
    for part, what in _OTHERS.items():
        if part in name.split("."):
            fix = "merge it with the library that trained it, and fuse the result"
            return RefusedError(Problem(f"{name}: {what}, which is no sum of W and B A", where, fix))
    fix = "a LoRA adapter has X.lora_A.weight and X.lora_B.weight (or X.lora_A and X.lora_B) for each layer X"
    return UsageError(Problem(f"{name} is no part of a LoRA adapter", where, fix))


def attach_adapter(model: nn.Module, adapter: Adapter, tied: Collection[str] = ()) -> None:
    """Puts the adapter's layers into the model, without their numbers.

    tied  names of tensors that have others too, where no plan will find that out
    Raises UsageError where a layer does not exist or shapes do not fit, RefusedError for layers that are
    none of those that W + scale B A is the same for.
    """
    tree = ModuleTree(model)
    require_known(adapter, tree.modules)
    where = str(adapter.path)
    problems, refused = [], []
    names: dict[int, list[str]] = {}
    for path, module in tree.modules.items():
        names.setdefault(id(module), []).append(path)
    for path, pair in adapter.pairs.items():
        layer = tree[path]
        others = [name for name in names[id(layer)] if name != path]
        no = _unfit(layer, others, f"{path}.weight" in tied) or (_bare(layer) if adapter.peft else "")
        if no:
            refused.append(
                Problem(f"{path}: {no}", where, "merge it yourself, or take it out of the adapter")
            )
        else:
            problems += [
                Problem(f"{path}: {what}", where, fix) for what, fix in _misshapen(layer, pair, adapter)
            ]
    if refused or problems:
        raise RefusedError(*refused) if refused else UsageError(*problems)
    for path, pair in adapter.pairs.items():
        rank = pair.down.shape[0]
        adapt(tree[path], rank, adapter.scale(rank), (pair.down.dtype, pair.up.dtype))


def require_known(adapter: Adapter, names: Collection[str]) -> None:
    """Raises UsageError with every layer of the adapter that `names` has not."""
    tree = NameTree([name for name in names if name])
    lost = [path for path in adapter.pairs if path not in tree]
    if lost:
        raise UsageError(*_lost(lost, tree, str(adapter.path)))


def _lost(lost: list[str], tree: NameTree, where: str) -> Iterator[Problem]:
    for path in lost[:_MOST_NAMES]:
        near = tree.nearest(path)
        fix = f"the nearest is {near}" if near else "is it the adapter of this model?"
        yield Problem(f"the adapter has {path}, which the model has not", where, fix)
    if len(lost) > _MOST_NAMES:
        yield Problem(f"and {len(lost) - _MOST_NAMES} more", where)


def _unfit(layer: nn.Module, others: Sequence[str], tied: bool) -> str:
    """Why W + scale B A would not be what the adapted layer computes; "" if it is.

    others   its names besides the one that the adapter has for it: whether they are adapted nobody says
    """
    if others:
        return f"it is the same module as {', '.join(others)} (shared-module)"
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"it is of class {type(layer).__name__}, no Linear or convolution"
    name, how = computed_tensor(layer)
    if how:
        return f"its {name} is computed from other tensors by {how} (parametrized)"
    if getattr(layer, "groups", 1) != 1:
        return f"it is a convolution of {layer.groups} groups"
    if "forward" in vars(layer):
        return "its forward was put on the instance"
    return "its weight is the same memory as another tensor (tied-weights)" if tied else ""


def _bare(layer: nn.Module) -> str:
    """Why PEFT's A is no convolution like the layer: it is made with its stride and padding, and no more."""
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"it pads with padding_mode {layer.padding_mode!r}, and PEFT has trained its A with zeros"
    dilation = getattr(layer, "dilation", (1,))
    if any(step != 1 for step in dilation):
        return f"it is a convolution of dilation {tuple(dilation)}, and PEFT has trained its A without one"
    return ""


def _misshapen(layer: nn.Module, pair: Pair, adapter: Adapter) -> Iterator[tuple[str, str]]:
    weight = layer._parameters["weight"]
    assert weight is not None
    down, up, shape = pair.down.shape, pair.up.shape, tuple(weight.shape)
    fix = f"the weight is {list(shape)}: A is [rank, {', '.join(map(str, shape[1:]))}]"
    if len(down) != len(shape) or down[0] < 1 or down[1:] != shape[1:]:
        yield f"lora_A is {list(down)}", fix
    elif up != (wanted := (shape[0], down[0], *(1 for _ in shape[2:]))):
        yield f"lora_B is {list(up)}, and lora_A is {list(down)}", f"B has to be {list(wanted)}"
    elif adapter.rank is not None and down[0] != adapter.rank:
        yield f"its rank is {down[0]}, and {CONFIG} says {adapter.rank}", "say scale in the spec"
