"""Tensors that leave torch: Python reads their memory behind the back of every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_ESCAPES = {
    getattr(Tensor, name): f"Tensor.{name}"
    for name in (
        *("numpy", "__array__", "tolist", "data_ptr", "__dlpack__"),
        *("storage", "untyped_storage", "__deepcopy__", "__reduce_ex__"),
    )
}
# What is read there and then; through all others somebody may go on reading, and write.
COPIES = frozenset({"Tensor.tolist", "Tensor.__deepcopy__", "Tensor.__reduce_ex__"})
# Of them, those that hand numbers to Python.
ASKING = frozenset(f"Tensor.{name}" for name in ("numpy", "__array__", "tolist"))


class Escapes(TorchFunctionMode):
    """Inside, `tell(name, tensor)` is called for each tensor that is handed to something outside of torch."""

    def __init__(self, tell: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ESCAPES and args and isinstance(args[0], Tensor):
            self._tell(_ESCAPES[func], args[0])
        return func(*args, **(kwargs or {}))
