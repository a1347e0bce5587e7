"""Does the edits to a module tree; a subclass keeps its forward.

What is changed is a new object in the place of the old one, with the same tensors where they are not new:
whoever holds the old one (a list of the model, a closure) has it as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusecli import nn as fused
from fusecli.nn import container_class, make_plain
from fusecli.nn.duplicate import duplicate
from fusecli.outcome import LedgerEntry
from fusecli.rewrite.edits import (
    Bias,
    Bordered,
    Clone,
    Container,
    Edit,
    Identity,
    Opaque,
    Own,
    Passed,
    Plain,
    Remainder,
    Resize,
    Rewrite,
    Zero,
)
from fusecli.rewrite.hooks import BACKWARD, POST, PRE, has_hooks, move_hooks, take_hooks
from fusecli.rewrite.tree import ModuleTree

# A manifest may come from anybody: a kernel that grew or a product of two layers is not larger than this, in
# elements or in times of what was there.
_ROOM, _ROOM_TIMES = 1 << 24, 1 << 10


def apply_rewrite(tree: ModuleTree, rewrite: Rewrite) -> tuple[LedgerEntry, ...]:
    """Sets the new tensors, then does the edits; returns what was lost on the way."""
    # What a custom fuser returned brings its own tensors, at any depth below its path.
    opaque = tuple(f"{edit.path}." for edit in rewrite.edits if isinstance(edit, Opaque))
    # A module of its own comes before its plain weight, that before its bias, and all before the tensors.
    early = [
        edit for edit in rewrite.edits if isinstance(edit, Own | Plain | Resize | Bordered | Clone | Bias)
    ]
    lost = _do(tree, early)
    set_tensors(tree, {k: t for k, t in rewrite.tensors.items() if not k.startswith(opaque)})
    return tuple(lost + _do(tree, (edit for edit in rewrite.edits if edit not in early)))


def apply_edits(tree: ModuleTree, edits: Iterable[Edit]) -> tuple[LedgerEntry, ...]:
    """Does the edits alone, as when a manifest is replayed before the tensors are loaded."""
    return tuple(_do(tree, edits))


def set_tensors(tree: ModuleTree, tensors: Mapping[str, Tensor]) -> None:
    """Gives modules new parameters; requires_grad stays what it was."""
    owners = {key.rpartition(".")[0] for key in tensors}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        # A module with layers inside that change too (its gain goes into one of them) is where those stand.
        around = any(other.startswith(f"{path}.") for other in owners)
        module = tree[path] if around else tree.renewed(path)
        if name in module._buffers:
            module._buffers[name] = tensor
            continue
        old = module._parameters[name]
        # A new Parameter, not new data in the old one: a copy of the model may still share the old one.
        wants_grad = old.requires_grad if old is not None else False
        module._parameters[name] = nn.Parameter(tensor, requires_grad=wants_grad)


def _do(tree: ModuleTree, edits: Iterable[Edit]) -> list[LedgerEntry]:
    lost: list[LedgerEntry] = []
    for edit in edits:
        if isinstance(edit, Own):
            tree.own(edit.path)
            continue
        lost += (LedgerEntry("hook", path, f"lost: {hook}") for path, hook in _apply(tree, edit))
    return lost


def _apply(tree: ModuleTree, edit: Edit) -> Iterator[tuple[str, str]]:
    match edit:
        case Plain(path):
            make_plain(tree.renewed(path))
            tree.note_plain(path)
        case Bordered(path):
            conv = tree[path]
            if type(conv) not in (fused.BorderedConv1d, fused.BorderedConv2d, fused.BorderedConv3d):
                tree.replace(path, fused.bordered(tree.renewed(path)))
        case Clone(path, into):
            if any(True for _ in tree[into].children()) or path.startswith(f"{into}."):
                raise ValueError(f"{into} is no single layer, which alone is stored several times")
            twin = duplicate(tree[into])
            _ = list(take_hooks(twin, PRE + POST + BACKWARD))
            yield from _lost(tree, path, PRE + BACKWARD)
            move_hooks(_changing(tree, path, POST), twin, POST)
            _replace(tree, path, twin)
        case Bias(path):
            _add_bias(tree.renewed(path))
        case Resize(path, sizes):
            _resize(tree.renewed(path), dict(sizes))
        case Passed(path, layers):
            identity = nn.Identity()
            move_hooks(_changing(tree, path, PRE), identity, PRE)
            for layer in layers:
                yield from _lost(tree, layer, PRE)
            yield from _lost(tree, path, POST + BACKWARD)
            _replace(tree, path, identity)
        case Zero(path, into):
            yield from _lost(tree, into, POST)
            yield from _lost(tree, path, PRE + POST + BACKWARD)
            _replace(tree, path, fused.Zero())
        case Identity(path, into, last):
            yield from _absorb(tree, path, into, keep_hooks=last)
            _replace(tree, path, nn.Identity())
        case Remainder(path, into, members):
            rest = nn.Sequential()
            # The output of the norm is still there: it is that of its last submodule.
            move_hooks(_changing(tree, path, POST), rest, POST)
            children: dict[str, Any] = tree[path]._modules
            rest._modules.update({name: children[name] for name in members})
            rest.training = tree[path].training  # only the flag: the submodules keep the modes they have
            yield from _absorb(tree, path, into, keep_hooks=False)
            _replace(tree, path, rest)
        case Container(path, cls, members):
            opening, closing = _changing(tree, members[0], PRE), _changing(tree, members[-1], POST)
            container = container_class(cls)(*(tree[member] for member in members))
            move_hooks(opening, container, PRE)
            move_hooks(closing, container, POST)
            _place(tree, path, members, container)
        case Opaque(path, members, fuser, result):
            if result is None:
                raise ValueError(f"fuser {fuser!r} has to be called before its edit is applied")
            move_hooks(_changing(tree, members[0], PRE), result, PRE)
            move_hooks(_changing(tree, members[-1], POST), result, POST)
            for member in members:
                yield from _lost(tree, member, PRE + POST + BACKWARD)
            _place(tree, path, members, result)


def _absorb(tree: ModuleTree, path: str, into: str, *, keep_hooks: bool) -> Iterator[tuple[str, str]]:
    """Hooks when the norm at `path` disappears into the layer at `into`."""
    yield from _lost(tree, into, POST)
    if keep_hooks and has_hooks(tree[path], POST):
        move_hooks(tree.renewed(path), tree.renewed(into), POST)
    yield from _lost(tree, path, PRE + POST + BACKWARD)


def _changing(tree: ModuleTree, path: str, registries: tuple[str, ...]) -> nn.Module:
    """The module at `path`, to take the hooks of `registries` from; without any it is not changed."""
    return tree.renewed(path) if has_hooks(tree[path], registries) else tree[path]


def _lost(tree: ModuleTree, path: str, registries: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    yield from ((path, hook) for hook in take_hooks(_changing(tree, path, registries), registries))


def _place(tree: ModuleTree, path: str, members: tuple[str, ...], module: nn.Module) -> None:
    _replace(tree, path, module)
    for member in members:
        if member != path:
            _replace(tree, member, nn.Identity())


def _replace(tree: ModuleTree, path: str, module: nn.Module) -> None:
    training = tree[path].training
    tree.replace(path, module if module.training == training else module.train(training))


def _add_bias(layer: nn.Module) -> None:
    if layer._parameters.get("bias") is None:
        weight = layer._parameters["weight"]
        if weight is None:
            raise TypeError(f"a {type(layer).__name__} without a weight gets no bias")
        size: Any = getattr(layer, "out_channels", None) or layer.out_features
        bias = torch.empty(size, dtype=weight.dtype, device=weight.device)
        layer._parameters["bias"] = nn.Parameter(bias, requires_grad=weight.requires_grad)


def _resize(layer: nn.Module, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Sets the attributes, and makes room for a weight and a bias of that size."""
    state: dict[str, Any] = vars(layer)
    for name, numbers in sizes.items():
        if name not in state:
            raise AttributeError(f"a {type(layer).__name__} has no {name}")
        state[name] = numbers if isinstance(state[name], tuple | str) else numbers[0]
    if "_reversed_padding_repeated_twice" in state:
        state["_reversed_padding_repeated_twice"] = [p for p in reversed(state["padding"]) for _ in range(2)]
    if "in_features" in state:
        outputs, shape = state["out_features"], (state["out_features"], state["in_features"])
    else:
        ends = (state["out_channels"], state["in_channels"])
        outputs, (first, second) = ends[0], ends[::-1] if state["transposed"] else ends
        shape = (first, second // state["groups"], *state["kernel_size"])
    for name, size in (("weight", shape), ("bias", (outputs,))):
        old = layer._parameters.get(name)
        if old is not None and old.shape != size:
            if math.prod(size) > max(_ROOM, _ROOM_TIMES * old.numel()):
                raise ValueError(f"a {name} of {list(size)} is no resized one of {list(old.shape)}")
            layer._parameters[name] = nn.Parameter(old.new_empty(size), old.requires_grad)
