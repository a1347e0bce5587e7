"""Buffers that do not follow the dtype of their model, and that grow when a state dict is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self


class Float32Buffers(nn.Module):
    """A module that goes to another device with its model, but not to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keeping_dtype, recurse)
        return self


def grow(buffer: Tensor, stored: Any) -> None:
    """Gives a buffer per channel the length of what is to be loaded into it: [0] until the first tensor.

    Anything but a vector keeps its shape, and torch reports the mismatch.
    """
    if isinstance(stored, Tensor) and stored.dim() == 1:
        buffer.resize_(stored.shape)
