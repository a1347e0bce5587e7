"""Which parameters does a run read? What no operation is given, no output can notice."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Reading(TorchFunctionMode):
    """Inside, the ids of all tensors that an operation is given are collected in `read`."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._note((args, tuple((kwargs or {}).values())))
        return func(*args, **(kwargs or {}))

    def _note(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.read.add(id(value))
        elif isinstance(value, tuple | list):
            for item in value:
                self._note(item)
