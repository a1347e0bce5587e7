"""A layer with a low-rank adapter beside it (LoRA), which runs as it was trained: the two added up."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONVOLVE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class Adapted(nn.Module):
    """y = layer(x) + scale B(A(x)): a Linear or Conv1-3d with lora_A and lora_B besides its own parameters.

    Shapes: Linear A [r, i], B [o, r]; convolution A [r, i, *k] with the layer's own geometry, B [o, r, 1..].
    Source: Hu et al. 2022 (LoRA), equation 3. The PEFT library gives A neither dilation nor padding mode, so
    its adapters of convolutions that have one are none of these.
    """

    SOURCES: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    plain_class: ClassVar[type[nn.Module]]
    lora_A: Tensor  # noqa: N815  (the field's own names, and the keys of its files)
    lora_B: Tensor  # noqa: N815
    lora_scale: float

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        y: Tensor = self.plain_class.forward(self, x)
        x = x.to(self.lora_A.dtype)  # adapters are often kept wider than the layer
        if isinstance(self, nn.Linear):
            added = F.linear(F.linear(x, self.lora_A), self.lora_B)
        else:
            convolve = next(function for cls, function in _CONVOLVE.items() if isinstance(self, cls))
            added = convolve(layer._conv_forward(x, self.lora_A, None), self.lora_B)
        return y + (self.lora_scale * added).to(y.dtype)

    def make_plain(self) -> None:
        """The layer alone, its weight W + scale B A in the arithmetic of its own dtype."""
        weight = self._parameters["weight"]
        assert weight is not None
        scale = self.lora_scale
        up, down = self.lora_B.flatten(1), self.lora_A.flatten(1)
        merged = weight + (scale * (up @ down)).view(weight.shape).to(weight.dtype)
        for name in self.SOURCES:
            del self._parameters[name]
        del self.__dict__["lora_scale"]
        self.__class__ = self.plain_class  # type: ignore[assignment]  # the class it had before `adapt`
        if not weight.is_meta:  # what has no numbers stays the same object, so that a tie is seen
            self._parameters["weight"] = nn.Parameter(merged.detach(), requires_grad=weight.requires_grad)


def adapt(layer: nn.Module, rank: int, scale: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Puts an adapter of that rank beside the layer, where it stands; its tensors are not set."""
    weight = layer._parameters["weight"]
    assert weight is not None
    ones = (1,) * (weight.ndim - 2)
    shapes = ((rank, *weight.shape[1:]), (weight.shape[0], rank, *ones))
    layer.__class__ = _adapted(type(layer))  # type: ignore[arg-type]  # a class can be hashed
    layer.__dict__["lora_scale"] = scale
    for name, shape, dtype in zip(Adapted.SOURCES, shapes, dtypes, strict=True):
        layer._parameters[name] = nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device), False)


@cache
def _adapted(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Adapted{cls.__name__}", (Adapted, cls), {"plain_class": cls})
