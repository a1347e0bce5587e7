"""Channels keep their labels wherever they are moved; what mixes them shows, what is unknown is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fusecli.graph.labels import CONFLICT, along, labels_at
from tests import nets
from tests.graph.conftest import folds, left, recorded

N, C, L = 2, 3, 4


class Moves(nn.Module):
    """Applies `move` to its input."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.move = move
        self.scale = nn.Parameter(torch.ones(C))
        self.register_buffer("other", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.move(x) + 1 if self.move.__code__.co_argcount == 1 else self.move(self, x) + 1


def moved(move: Callable[..., Tensor], seeds: Callable[..., dict[int, Tensor]]) -> Tensor | None:
    recording = recorded(Moves(move), nets.images(N, C, L))
    return labels_at(recording, recording.calls[-1].reads[0], seeds(recording))


def of_input(recording: object) -> dict[int, Tensor]:
    return {recording.named("input 0").number: along((N, C, L), 1)}  # type: ignore[attr-defined, union-attr]


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "permute": lambda x: x.permute(2, 0, 1),
    "transpose": lambda x: x.transpose(1, 2).contiguous(),
    "flatten": lambda x: x.flatten(1),
    "reshape": lambda x: x.reshape(N * C, L),
    "movedim": lambda x: x.view(N, C, 2, 2).movedim(1, -1),
    "expand": lambda x: x.unsqueeze(0).expand(5, -1, -1, -1),
    "repeat": lambda x: x.repeat(2, 2, 1),
    "unflatten": lambda x: x.squeeze().unflatten(2, (2, 2)),
    "cast": lambda x: x.double(),
    "clone": lambda x: x.clone(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_carries_labels(name: str) -> None:
    move = MOVES[name]
    labels = moved(move, of_input)
    assert labels is not None
    expected = move(along((N, C, L), 1).contiguous())
    assert torch.equal(labels.to(torch.int32), expected.to(torch.int32))


def test_labels_that_agree_stay() -> None:
    def scaled(net: Moves, x: Tensor) -> Tensor:
        return x * net.scale.view(1, -1, 1)

    def seeds(recording: object) -> dict[int, Tensor]:
        return of_input(recording) | {recording.named("scale").number: along((C,), 0)}  # type: ignore[attr-defined]

    labels = moved(scaled, seeds)
    assert labels is not None
    assert torch.equal(labels, along((N, C, L), 1))


@pytest.mark.parametrize(
    "mix",
    [
        lambda net, x: x + x.reshape(N, L, C).transpose(1, 2).contiguous(),
        lambda net, x: x.view(N, L, C) * net.scale,
    ],
    ids=["two orders", "scaled along another axis"],
)
def test_two_labels_in_one_element_are_a_conflict(mix: Callable[..., Tensor]) -> None:
    def seeds(recording: object) -> dict[int, Tensor]:
        return of_input(recording) | {recording.named("scale").number: along((C,), 0)}  # type: ignore[attr-defined]

    labels = moved(mix, seeds)
    assert labels is not None
    assert bool((labels == CONFLICT).any())


def test_no_label_arrives_from_elsewhere() -> None:
    assert moved(lambda x: torch.ones(N, C, L), of_input) is None
    assert moved(lambda net, x: net.scale * 2, of_input) is None


@pytest.mark.parametrize(
    ("move", "op"),
    [
        (lambda x: x.cumsum(1), "aten.cumsum"),
        (lambda x: x.softmax(1), "aten._softmax"),
        (lambda x: x.sort(1).values, "aten.sort"),
        (lambda x: x.amax(1, keepdim=True).expand(-1, C, -1), "aten.amax"),
    ],
)
def test_an_op_that_is_not_known_is_named(move: Callable[[Tensor], Tensor], op: str) -> None:
    with pytest.raises(LookupError, match=op):
        moved(move, of_input)


# --- what it is for


def test_instance_norm_repeats_its_statistics() -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    net = nets.chain(conv=nn.Conv2d(3, 4, 3), norm=norm)
    assert folds(net, nets.images(2, 3, 5, 5)) == [("conv", "norm")]


def test_a_frozen_norm_reshapes_its_vectors() -> None:
    net = nets.chain(conv=nn.Conv2d(3, 4, 3), norm=nets.FrozenBatchNorm2d(4))
    assert folds(net, nets.images(2, 3, 5, 5)) == [("conv", "norm")]


def test_a_frozen_norm_on_another_axis() -> None:
    class Across(nets.FrozenBatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    net = nets.chain(conv=nn.Conv2d(3, 3, 3), norm=Across(3))
    assert left(net, nets.images(2, 3, 5, 5)) == {"norm": "bn-axis"}


def test_channels_that_were_shuffled() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2))

    assert left(nets.randomise(Shuffled(), 0), nets.images(2, 3, 5, 5)) == {}
