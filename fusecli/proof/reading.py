"""Which parameters does a run read? What no operation is given, no output can notice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusecli.graph.places import place

_ASKING = frozenset(
    getattr(Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "__array__"),
        *("__bool__", "__int__", "__float__", "__index__", "is_nonzero", "equal"),
    )
) | {torch.equal, torch.is_nonzero}


class Reading(TorchFunctionMode):
    """Inside, the ids of all tensors that an operation is given are collected in `read`, and in `asked` the
    lines of code that ask one for its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.asked: dict[str, None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ASKING and (line := place()):
            self.asked[line] = None
        self._note((args, tuple((kwargs or {}).values())))
        return func(*args, **(kwargs or {}))

    def _note(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.read.add(id(value))
        elif isinstance(value, tuple | list):
            for item in value:
                self._note(item)
