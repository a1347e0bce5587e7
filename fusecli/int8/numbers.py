"""How near one tensor is to another: signal to noise, cosine, top-1; and the accuracy of scores.

Sums are taken in float64. What is not finite is the worst there is, and tensors of two shapes are an error:
nothing is broadcast, and no mean hides a NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_NO_CLASS = -1


@dataclass
class Sums:
    """Sums over everything seen of one tensor: products as scalars, of a batch's rows the cosines only."""

    signal: float = 0.0
    other: float = 0.0
    dot: float = 0.0
    noise: float = 0.0
    cosines: list[Tensor] = field(default_factory=list)
    agreements: list[Tensor] = field(default_factory=list)

    def add(self, reference: Tensor, other: Tensor) -> None:
        x, y = _in_float64(reference, other)
        self.signal += float((x * x).sum())
        self.other += float((y * y).sum())
        self.dot += float((x * y).sum())
        self.noise += float((x - y).square().sum())

    def add_rows(self, reference: Tensor, other: Tensor) -> None:
        self.add(reference, other)
        self.cosines.append(cosines(reference, other))
        self.agreements.append(_agreements(reference, other))

    @property
    def finite(self) -> bool:
        return math.isfinite(self.signal + self.noise)

    @property
    def sqnr(self) -> float:
        if not self.finite:
            return -math.inf
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        sums = torch.tensor([self.dot, self.signal, self.other, self.noise], dtype=torch.float64)
        return float(_cosine(*sums))

    @property
    def mean_cosine(self) -> float:
        return float(torch.cat(self.cosines).mean()) if self.finite else -1.0

    @property
    def worst_cosine(self) -> float:
        return float(torch.cat(self.cosines).min())

    @property
    def top1(self) -> float | None:
        return _share(torch.cat(self.agreements))


def sqnr(reference: Tensor, other: Tensor) -> float:
    """10 log10(sum x^2 / sum (x - y)^2) in dB, the signal to quantization noise ratio; x is the reference.

    Summed in float64. inf where x and y are equal, also where both are 0; -inf where only x is 0, and where
    either is not finite: nothing is known to be left of the signal then.
    Source: Gersho and Gray, Vector Quantization and Signal Compression (1992), section 5.2.
    """
    sums = Sums()
    sums.add(reference, other)
    return sums.sqnr


def cosines(reference: Tensor, other: Tensor) -> Tensor:
    """x.y / (|x| |y|) for each row of a batch [n, ...], flattened: [n] in float64. [n] and [] are one row.

    That is how embeddings are compared: each by itself, whatever its length. 1 where a row is equal, 0 where
    one of the two is zero, -1, the worst there is, where either is not finite.
    """
    x, y = (
        tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
        for tensor in _in_float64(reference, other)
    )
    return _cosine((x * y).sum(1), (x * x).sum(1), (y * y).sum(1), (x - y).square().sum(1))


def cosine(reference: Tensor, other: Tensor) -> float:
    """The mean of `cosines` over the batch, but -1 where anything is not finite: no mean may hide a NaN."""
    leaf = Sums()
    leaf.add_rows(reference, other)
    return leaf.mean_cosine


def top1(reference: Tensor, other: Tensor) -> float | None:
    """The share of the rows of [n, classes > 1] whose argmax is the same; None for other shapes, and n = 0.

    Of equal scores the first counts, as everywhere in torch. A row that is not finite agrees with none.
    """
    return _share(_agreements(reference, other))


def telling_size(reference: Tensor, other: Tensor) -> float:
    """The largest finite |x| of what differs: what is equal in both, such as the filling of a mask, is no
    measure of an error. Where that is small it is what rounding leaves of the rest, 2^-14, up to 1e6."""
    size = reference.abs().double().where(reference.isfinite(), 0.0)
    if not size.numel():
        return 0.0
    floor = 2.0**-14 * min(float(size.max()), 1e6)
    return max(float(size.where(reference != other, 0.0).max()), floor)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """The share of the rows of [n, classes] whose argmax is the label [n]; one that is not finite misses."""
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(scores) == 0:
        raise ValueError(
            f"scores {list(scores.shape)} and labels {list(labels.shape)}: [n, c] and [n] are needed"
        )
    return float((_choices(scores) == labels.to(scores.device)).double().mean())


def _same_shape(reference: Tensor, other: Tensor) -> None:
    if reference.shape != other.shape:
        raise ValueError(f"{list(reference.shape)} cannot be compared with {list(other.shape)}")


def _in_float64(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    _same_shape(reference, other)
    return reference.detach().double(), other.detach().double()


def _cosine(dot: Tensor, xx: Tensor, yy: Tensor, noise: Tensor) -> Tensor:
    lengths = (xx * yy).sqrt()
    value = torch.where(lengths > 0, dot / lengths, 0.0).clamp(-1, 1)
    value = torch.where(noise == 0, 1.0, value)
    return torch.where((xx + noise).isfinite(), value, -1.0)


def _agreements(reference: Tensor, other: Tensor) -> Tensor:
    """Whether the argmax is the same, [n] of booleans; [0] where there are no classes to choose from."""
    _same_shape(reference, other)
    if reference.ndim != 2 or reference.shape[1] < 2:
        return torch.zeros(0, dtype=torch.bool)
    chosen = _choices(reference)
    return (chosen == _choices(other)) & (chosen != _NO_CLASS)


def _choices(scores: Tensor) -> Tensor:
    return torch.where(scores.isfinite().all(1), scores.argmax(1), _NO_CLASS)


def _share(agreements: Tensor) -> float | None:
    return float(agreements.double().mean()) if len(agreements) else None
