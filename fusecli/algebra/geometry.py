"""How a linear layer moves over its input: everything about it but the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Geometry:
    """Stride, padding and dilation per spatial axis; rank 0 (all empty) is a linear layer.

    `padding` holds (before, after) for each axis. A transposed conv crops its output by it, and
    appends `output_padding`; left empty, that is 0 everywhere.
    Raises ValueError for lengths that differ and for values that no layer can have.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        if not self.output_padding:
            object.__setattr__(self, "output_padding", (0,) * self.rank)
        lengths = {len(self.stride), len(self.padding), len(self.dilation), len(self.output_padding)}
        if len(lengths) != 1 or self.rank > 3:
            raise ValueError(f"a geometry has one entry per spatial axis, at most 3: {self}")
        steps, margins = (*self.stride, *self.dilation), (*sum(self.padding, ()), *self.output_padding)
        if min(steps, default=1) < 1 or min(margins, default=0) < 0:
            raise ValueError(f"stride and dilation start at 1, padding at 0: {self}")
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"padding mode {self.padding_mode!r} is none of {PADDING_MODES}")
        self._check_direction()

    def _check_direction(self) -> None:
        symmetric = all(before == after for before, after in self.padding)
        if self.transposed and not (symmetric and self.padding_mode == "zeros"):
            raise ValueError(f"a transposed conv crops evenly and knows no padding mode: {self}")
        if not self.transposed and any(self.output_padding):
            raise ValueError(f"only a transposed conv has output_padding: {self}")

    @classmethod
    def linear(cls) -> Geometry:
        """The geometry of a linear layer: no spatial axes."""
        return cls((), (), ())

    @classmethod
    def from_attributes(
        cls,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: str | Sequence[int],
        dilation: Sequence[int],
        *,
        transposed: bool = False,
        output_padding: Sequence[int] = (),
        padding_mode: str = "zeros",
    ) -> Geometry:
        """The geometry of a torch conv module whose attributes of the same names are these.

        "same" pads d (k - 1) in total, the smaller half before, as ATen's _convolution_same does.
        """
        return cls(
            tuple(stride),
            _margins(kernel_size, padding, dilation),
            tuple(dilation),
            transposed,
            tuple(output_padding) if transposed else (),
            padding_mode,
        )

    @property
    def rank(self) -> int:
        return len(self.stride)

    @property
    def padded(self) -> bool:
        """Whether a conv reads, or a transposed conv crops, anything beyond the border."""
        return any(before or after for before, after in self.padding)

    @property
    def zero_bordered(self) -> bool:
        """Whether some outputs of a conv read zeros that stand for no input."""
        return self.padded and self.padding_mode == "zeros" and not self.transposed


def _margins(
    kernel_size: Sequence[int], padding: str | Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return tuple((0, 0) for _ in kernel_size)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        raise ValueError(f"padding {padding!r} is neither 'same' nor 'valid'")
    return tuple((p, p) for p in padding)
