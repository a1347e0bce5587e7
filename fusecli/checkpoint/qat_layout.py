"""Whether tensors come from quantization-aware training, by their names, and their names in a float model.

torch.ao writes two layouts, and for a layer at `p` with a norm inside they are, beside the plain one:

    fused      p.0.weight         p.1.running_mean         containers, as those of fusecli.nn
    prepared   p.weight           p.bn.running_mean        prepare_qat; before version 2 p.gamma, p.beta,
               p.weight_fake_quant.scale                   p.running_mean (conv_fused.py, "Serialization
               p.activation_post_process.scale             version history")

Either is read as `p.weight` and `p.bn.running_mean`; the caller knows what the norm is called in its model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Shapes = Mapping[str, tuple[int, ...]]

WEIGHT, OUTPUT = "weight_fake_quant", "activation_post_process"
# FX numbers the observers of outputs; up to torch 1.11 it put the name of the observed value in front.
_OBSERVER = re.compile(rf"{WEIGHT}|(\w+_)?{OUTPUT}(_\d+)?")
# A module is what it is called only if it holds one of these: anybody may use these names.
_STATES = ({"scale", "zero_point"}, {"min_val", "max_val"}, {"min_vals", "max_vals"}, {"fake_quant_enabled"})
_STATISTICS = {"running_mean", "running_var"}
_NORM = {"weight", "bias", "num_batches_tracked", *_STATISTICS}
_WEIGHTS = ("parametrizations.weight.", "weight_v", "weight_orig")
_VERSION_1 = {
    "gamma": "bn.weight",
    "beta": "bn.bias",
    "running_mean": "bn.running_mean",
    "running_var": "bn.running_var",
    "num_batches_tracked": "bn.num_batches_tracked",
}


@dataclass(frozen=True)
class Quantizer:
    """The keys of what a fake quantizer rounds with.

    folded   it saw the weight times gamma / sqrt(running_var + eps), not the stored weight
    seen     the lowest and the highest value that made its scale; None: its scale is not made of what it saw
    """

    scale: str
    zero_point: str
    folded: bool
    seen: tuple[str, str] | None = None


@dataclass(frozen=True)
class QatLayout:
    """How to read each key of the file, which is in one of `names`, `quantizers` and `dropped`.

    kind         "prepared": there are observers; "fused": containers alone
    names        key -> its name in the plain layout, for all that a float model has
    units        paths of layers that have a norm inside, in the order of the file
    quantizers   by what they quantize: "p.weight", "p.output", or the observer's path where FX numbered it
    dropped      the state of the observers: nothing that a float model has
    """

    kind: Literal["fused", "prepared"]
    names: Mapping[str, str]
    units: tuple[str, ...]
    quantizers: Mapping[str, Quantizer]
    dropped: tuple[str, ...]


def qat_layout(shapes: Shapes, contains: Callable[[str], bool] = lambda _: False) -> QatLayout | None:
    """The layout of a state dict with tensors of these shapes; None: a plain one.

    contains   whether a path may be a container: `p.0` and `p.1` are also what Sequential(conv, bn) has, so
               names alone do not tell. An observer on `p` itself does: torch.ao puts none on a Sequential.

    Raises ValueError where two keys would get one name.
    """
    observers = _observers(shapes)
    observed = {key for keys in observers.values() for key in keys}
    floats = {key: shape for key, shape in shapes.items() if key not in observed}
    pairs, singles = _containers(floats, lambda path: _below(path, OUTPUT) in observers or contains(path))
    if not observers and not pairs and not singles:
        return None
    prepared = {path for path in map(_owner, observers) if _has_norm(path, observers, floats)}
    names = _named(floats, prepared, pairs, singles)
    quantizers = dict(_quantizers(observers, prepared, names))
    used = {key for quantizer in quantizers.values() for key in (quantizer.scale, quantizer.zero_point)}
    return QatLayout(
        kind="prepared" if observers else "fused",
        names=names,
        units=tuple(_in_order(shapes, prepared | pairs)),
        quantizers=quantizers,
        dropped=tuple(key for key in shapes if key in observed - used),
    )


def _observers(keys: Iterable[str]) -> dict[str, list[str]]:
    """The keys of each observer, by its path; one inside another belongs to the outer one."""
    below: dict[str, list[str]] = {}
    paths = {key: tuple(_observer_paths(key)) for key in keys}
    for key, candidates in paths.items():
        for path in candidates:
            below.setdefault(path, []).append(key)
    real = {path for path, inside in below.items() if _is_observer(path, inside)}
    found: dict[str, list[str]] = {}
    for key, candidates in paths.items():
        if outer := next((path for path in candidates if path in real), None):
            found.setdefault(outer, []).append(key)
    return found


def _observer_paths(key: str) -> Iterator[str]:
    parts = key.split(".")
    for end, part in enumerate(parts[:-1], start=1):
        if _OBSERVER.fullmatch(part):
            yield ".".join(parts[:end])


def _is_observer(path: str, keys: Iterable[str]) -> bool:
    inside = {key[len(path) + 1 :] for key in keys}
    return any(state <= inside for state in _STATES)


def _containers(floats: Shapes, may_be: Callable[[str], bool]) -> tuple[set[str], set[str]]:
    """Paths of containers of a layer and a norm, and of those of one module that has tensors."""
    inside: dict[str, dict[str, tuple[int, ...]]] = {}
    first = {path for key in floats for path, rest in _splits(key) if rest.startswith("0.")}
    candidates = {path for path in first if may_be(path)}
    for key, shape in floats.items():
        for path, rest in _splits(key):
            if path in candidates:
                inside.setdefault(path, {})[rest] = shape
    members = {path: _members(tensors) for path, tensors in inside.items()}
    pairs = {path for path, count in members.items() if count == 2}
    return pairs, {path for path, count in members.items() if count == 1}


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Every module that holds the key, the model itself first, and the key's name in there."""
    yield "", key
    for at, letter in enumerate(key):
        if letter == ".":
            yield key[:at], key[at + 1 :]


def _members(tensors: Shapes) -> int:
    """How many modules with tensors a container with these has; 0: it is none."""
    first, second = _child(tensors, "0."), _child(tensors, "1.")
    if len(first) + len(second) < len(tensors):
        return 0
    if not second:
        return int(_is_norm(first) or _is_layer(first))
    fits = "weight" not in first or first["weight"][:1] == second.get("running_mean")
    return 2 if _is_layer(first) and _is_norm(second) and fits else 0


def _child(tensors: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name[len(prefix) :]: shape for name, shape in tensors.items() if name.startswith(prefix)}


def _is_norm(tensors: Shapes) -> bool:
    return _STATISTICS <= tensors.keys() <= _NORM


def _is_layer(tensors: Shapes) -> bool:
    """A weight, stored or computed, and no module inside but what computes it."""
    if len(tensors.get("weight", (0, 0))) < 2:
        return False
    own = all("." not in name or name.startswith("parametrizations.") for name in tensors)
    return own and any(name == "weight" or name.startswith(_WEIGHTS) for name in tensors)


def _has_norm(path: str, observers: Mapping[str, object], floats: Shapes) -> bool:
    """Whether a layer was prepared with its norm: a user's own convolution may have a child `bn` too."""
    if _below(path, WEIGHT) not in observers:
        return False
    old = _below(path, "gamma") in floats and _below(path, "running_mean") in floats
    return _below(path, "weight") in floats and (old or _below(path, "bn.running_mean") in floats)


def _named(floats: Iterable[str], prepared: set[str], pairs: set[str], singles: set[str]) -> dict[str, str]:
    """Every key's plain name."""
    names = {key: _plain(key, prepared, pairs, singles) for key in floats}
    owners: dict[str, str] = {}
    for key, name in names.items():
        if name in owners:
            raise ValueError(f"keys '{owners[name]}' and '{key}' would both be named '{name}'")
        owners[name] = key
    return names


def _plain(key: str, prepared: set[str], pairs: set[str], singles: set[str]) -> str:
    for path, rest in _splits(key):
        if path in prepared and rest in _VERSION_1:
            return _below(path, _VERSION_1[rest])
        if path in pairs or path in singles:
            return _below(path, rest.removeprefix("0.") if rest.startswith("0.") else f"bn.{rest[2:]}")
    return key


def _quantizers(
    observers: Mapping[str, list[str]], prepared: set[str], names: Mapping[str, str]
) -> Iterator[tuple[str, Quantizer]]:
    """Those that have a scale: what observes only has ranges."""
    for path, keys in observers.items():
        scale, zero_point = f"{path}.scale", f"{path}.zero_point"
        if not {scale, zero_point} <= set(keys):
            continue
        owner, name = _owner(path), path.rpartition(".")[2]
        folded = name == WEIGHT and owner in prepared
        if name == WEIGHT:
            weight = _below(owner, "weight")
            name = names.get(weight, weight)
        else:
            name = _below(owner, "output") if name == OUTPUT else path
        yield name, Quantizer(scale, zero_point, folded, _seen(path, set(keys)))


def _seen(path: str, keys: set[str]) -> tuple[str, str] | None:
    """Where a fake quantizer keeps the range of the values it has seen, if its scale is made of that."""
    if f"{path}.learning_enabled" in keys:
        return None  # the scale of a learnable one is a parameter
    for inside in ("activation_post_process.", ""):
        for ending in ("", "s"):
            pair = (f"{path}.{inside}min_val{ending}", f"{path}.{inside}max_val{ending}")
            if set(pair) <= keys:
                return pair
    return None


def _in_order(keys: Iterable[str], units: set[str]) -> Iterator[str]:
    seen = set()
    for key in keys:
        for path, _ in _splits(key):
            if path in units and path not in seen:
                seen.add(path)
                yield path


def _owner(path: str) -> str:
    return path.rpartition(".")[0]


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
