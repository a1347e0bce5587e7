"""Running somebody's model on a copy of its inputs: in eval mode, seeded, without gradients, in one dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fusecli.sample import Sample, cast, seeded

_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}
_LIKE_ANOTHER = {Tensor.to, Tensor.type_as}  # x.to(other), where the other is no parameter and stayed narrow
_WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}


def run(model: nn.Module, sample: Sample, *, seed: int, dtype: torch.dtype | None = None) -> Any:
    """What `model` returns for a copy of `sample`, as fresh tensors; random ops start from `seed`.

    dtype float64 also widens what the forward narrows by itself (`x.float()`, `torch.zeros(n)`).
    The caller's random state stays as it was.
    """
    inputs = sample.copy(dtype)
    exact = float64_arithmetic() if dtype is torch.float64 else nullcontext()
    with seeded(seed), torch.no_grad(), exact:
        return cast(model(*inputs.args, **inputs.kwargs), None)


@contextmanager
def float64_arithmetic() -> Iterator[None]:
    """Inside, casts to a narrower floating dtype and new tensors without one are float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(default)


class _Widen(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CASTS:
            return args[0].double()
        wide = [_wide(value) for value in args]
        named = {key: _wide(value) for key, value in (kwargs or {}).items()}
        if func in _LIKE_ANOTHER:
            return func(wide[0], *map(_double, wide[1:]), **named)
        try:
            return func(*wide, **named)
        except RuntimeError:
            # A tensor that is neither parameter nor buffer has stayed narrow, and this op wants equal dtypes.
            return func(*map(_double, wide), **{key: _double(value) for key, value in named.items()})


def _wide(value: Any) -> Any:
    return _WIDE[value] if isinstance(value, torch.dtype) and value in _WIDE else value


def _double(value: Any) -> Any:
    return value.to(_WIDE[value.dtype]) if isinstance(value, Tensor) and value.dtype in _WIDE else value


def dense(tensor: Tensor) -> Tensor:
    """Sparse tensors compare and add with few others."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def changed_buffers(before: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Names of the buffers that a run has written to."""
    now = {name: dense(buffer) for name, buffer in model.named_buffers()}
    return [name for name, old in before.items() if name in now and not torch.equal(dense(old), now[name])]
