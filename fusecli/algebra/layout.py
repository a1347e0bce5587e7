"""The only place that knows how layers store their weights.

    linear           [o, i]         with one group
    conv             [g*o, i, *k]
    transposed conv  [g*i, o, *k]

Everywhere else a weight is [g, o, i, *k].
"""

from __future__ import annotations

from torch import Tensor

from fusecli.errors import require


def unpack(storage: Tensor, groups: int, transposed: bool) -> Tensor:
    """The weight [g, o, i, *k], a view of what the layer stores.

    Raises NotFoldable "shape" when the storage has fewer than two axes or its first one does not
    split into `groups`.
    """
    require(
        storage.ndim >= 2 and groups >= 1 and storage.shape[0] % groups == 0,
        "shape",
        f"a stored weight {list(storage.shape)} does not split into {groups} groups",
        remedy="check the layer's groups",
    )
    split = storage.view(groups, storage.shape[0] // groups, *storage.shape[1:])
    return split.transpose(1, 2) if transposed else split


def pack(weight: Tensor, transposed: bool) -> Tensor:
    """What the layer stores for the weight [g, o, i, *k]: `pack(unpack(w, g, t), t)` is w.

    A view whenever the memory order of `weight` allows, as it does for every weight that came
    from `unpack` and kept its order; a copy otherwise.
    """
    return (weight.transpose(1, 2) if transposed else weight).flatten(0, 1)
