"""Every kind of linear layer torch has, small: the grid over which the laws are stated."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusecli.algebra import ChannelAffine, Geometry, LinearOp, batch_norm, unpack

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
CHANNELS = {"dense": (4, 6, 1), "grouped": (4, 6, 2), "depthwise": (4, 4, 4), "multiplier": (4, 8, 4)}
# Two of the paddings need stride 1, which torch demands of "same".
PADDINGS: dict[str, dict[str, Any]] = {
    "unpadded": {"kernel_size": 3},
    "zeros": {"kernel_size": 3, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same"},
    "even": {"kernel_size": 2, "padding": "same"},
    "even_reflect": {"kernel_size": 2, "padding": "same", "padding_mode": "reflect"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    "pointwise": {"kernel_size": 1},
}


@dataclass(frozen=True)
class Case:
    """One layer of the grid: how to build it, and the input it takes, [2, c, *spatial]; in what the product
    it is one of has it a choice."""

    name: str
    build: Callable[[], nn.Module]
    spatial: tuple[int, ...]
    choices: tuple[object, ...] = ()

    @property
    def module(self) -> Any:
        """The layer in float64, the same each time."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        return self.build().double()

    @cached_property
    def op(self) -> LinearOp:
        return lift(self.module)

    @cached_property
    def x(self) -> Tensor:
        return random(2, self.op.in_channels, *self.spatial)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def affine(channels: int, *, shifted: bool = True) -> ChannelAffine:
    """A trained-looking BatchNorm: a third of its gammas negative, no statistic at its default."""
    rng = torch.Generator().manual_seed(channels)
    mean, beta, gamma = (torch.randn(channels, generator=rng, dtype=torch.float64) for _ in range(3))
    var = torch.rand(channels, generator=rng, dtype=torch.float64) + 0.1
    gamma[::3] = -gamma[::3].abs()
    if not shifted:
        return batch_norm(torch.zeros_like(mean), var, 1e-3, gamma)
    return batch_norm(mean, var, 1e-3, gamma, beta)


def lift(module: Any) -> LinearOp:
    """The value of a torch layer."""
    if isinstance(module, nn.Linear):
        return LinearOp(unpack(module.weight, 1, False), module.bias, Geometry.linear())
    geometry = Geometry.from_attributes(
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        transposed=module.transposed,
        output_padding=module.output_padding,
        padding_mode=module.padding_mode,
    )
    return LinearOp(unpack(module.weight, module.groups, module.transposed), module.bias, geometry)


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal but for the rounding of float64: within 1e-12 of the largest value."""
    return actual.shape == expected.shape and bool(
        (actual - expected).abs().max() <= 1e-12 * expected.abs().max()
    )


def _linear() -> Iterator[Case]:
    for bias in (True, False):
        yield Case(f"linear-bias={bias:d}", lambda bias=bias: nn.Linear(5, 7, bias), ())


def _conv() -> Iterator[Case]:
    for rank, kind, bias, stride, dilation, padding in product(
        CONV, CHANNELS, (True, False), (1, 2), (1, 2), PADDINGS
    ):
        if stride > 1 and PADDINGS[padding].get("padding") == "same":
            continue
        i, o, groups = CHANNELS[kind]
        options = dict(PADDINGS[padding], stride=stride, dilation=dilation, groups=groups, bias=bias)
        yield Case(
            f"conv{rank}d-{kind}-{padding}-bias={bias:d}-stride={stride}-dilation={dilation}",
            lambda rank=rank, i=i, o=o, options=options: CONV[rank](i, o, **options),
            (8, 7, 6)[:rank],
            ("conv", rank, kind, bias, stride, dilation, padding),
        )


def _conv_transpose() -> Iterator[Case]:
    for rank, kind, bias, stride, dilation, padding, extra in product(
        CONV, CHANNELS, (True, False), (1, 2), (1, 2), (0, 1), (0, 1)
    ):
        if extra >= max(stride, dilation):
            continue
        i, o, groups = CHANNELS[kind]
        options = {"kernel_size": 3, "stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
        options |= {"padding": padding, "output_padding": extra}
        yield Case(
            f"transposed{rank}d-{kind}-bias={bias:d}-stride={stride}-dilation={dilation}"
            f"-padding={padding}-output_padding={extra}",
            lambda rank=rank, i=i, o=o, options=options: CONV_TRANSPOSE[rank](i, o, **options),
            (5, 4, 3)[:rank],
            ("transposed", rank, kind, bias, stride, dilation, padding, extra),
        )


def _uneven() -> Iterator[Case]:
    """Axes that differ in everything: an axis mistaken for another shows here only."""
    conv2 = {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}
    conv3 = {"kernel_size": (3, 1, 2), "stride": (2, 1, 1), "padding": (0, 2, 1), "dilation": (1, 3, 2)}
    reflect = {"kernel_size": (3, 2, 1), "padding": "same", "dilation": (1, 3, 1), "padding_mode": "reflect"}
    yield Case("uneven-conv2d", lambda: nn.Conv2d(4, 6, **conv2, groups=2), (8, 7))
    yield Case("uneven-conv3d", lambda: nn.Conv3d(4, 6, **conv3), (8, 7, 6))
    yield Case("uneven-reflect", lambda: nn.Conv3d(4, 6, **reflect), (8, 7, 6))
    yield Case(
        "uneven-transposed2d", lambda: nn.ConvTranspose2d(4, 6, **conv2, output_padding=(1, 0)), (5, 4)
    )
    yield Case("uneven-transposed3d", lambda: nn.ConvTranspose3d(4, 6, **conv3, groups=2), (5, 7, 4))


def _grouped_linear() -> LinearOp:
    return LinearOp(random(2, 3, 4), random(6), Geometry.linear())


CASES = [*_linear(), *_conv(), *_conv_transpose(), *_uneven()]


def covering(cases: Iterable[Case]) -> list[Case]:
    """Some of them, in which every two choices that meet in one of `cases` meet; those that are of no product
    are all there."""
    known = list(cases)
    chosen = [case for case in known if not case.choices]
    left = {case.name: pairs_of(case) for case in known if case.choices}
    missing = set[object]().union(*left.values())
    while missing:
        best = max(left, key=lambda name: len(left[name] & missing))
        missing -= left[best]
        chosen.append(next(case for case in known if case.name == best))
    return chosen


def pairs_of(case: Case) -> frozenset[object]:
    """Every two of its choices, each with its place."""
    if not case.choices:
        return frozenset()
    return frozenset((case.choices[0], *pair) for pair in combinations(enumerate(case.choices[1:]), 2))


def each(cases: Iterable[Case]) -> Any:
    """A test of each case: in every run of those that cover all of them, of the others in a slow one."""
    known = list(cases)
    quick = {case.name for case in covering(known)}
    slow: dict[bool, Any] = {True: (), False: pytest.mark.slow}
    listed = [pytest.param(case, id=case.name, marks=slow[case.name in quick]) for case in known]
    return pytest.mark.parametrize("case", listed)


GROUPED_LINEAR = _grouped_linear()
