"""Edits of a manifest that comes from anybody: what they may not do to a model."""

from __future__ import annotations

import json

import pytest
from torch import nn

from fusecli.artifact import replay
from fusecli.errors import FusecliError, UsageError
from fusecli.rewrite import Clone, Manifest, Resize


def model() -> nn.Module:
    return nn.ModuleDict(
        {"conv": nn.Conv2d(3, 4, 3), "bns": nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])}
    )


@pytest.mark.parametrize(
    "edit",
    [
        Clone("bns.0", "bns"),  # doubles with each time
        Clone("conv", "nowhere"),
        Resize("conv", (("out_channels", (1 << 30,)), ("in_channels", (1 << 30,)))),
        Resize("conv", (("out_channels", (100_000,)), ("in_channels", (100_000,)))),
        Resize("bns.0", (("out_channels", (4,)),)),
    ],
    ids=str,
)
def test_an_edit_that_does_not_fit(edit: Clone | Resize) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        replay(model(), [edit], "file")


@pytest.mark.parametrize(
    "hints",
    [
        {"groups": -1},
        {"groups": True},
        {"kind": "conv9d"},
        {"kind": 1e308},
        {"stride": [1 << 40]},
        {"stride": []},
        {"eps": -1.0},
        {"eps": "1"},
        {"other": 1},
    ],
    ids=str,
)
def test_hints_that_are_none(hints: dict[str, object]) -> None:
    group = {"modules": ["a", "b"], "rule": "conv_bn", "evidence": "observed", "kept": [], "hints": hints}
    whole = json.loads(Manifest("folded", (), (), "ab" * 32, "cd" * 32).to_json()) | {"groups": [group]}
    with pytest.raises(FusecliError, match="damaged"):
        Manifest.from_json(json.dumps(whole), "file")


@pytest.mark.parametrize(
    "sizes",
    [[["weight", [1]]], [["kernel_size", [0.5]]], [["kernel_size", [1, 1, 1, 1]]], [["stride", [-1]]], 3],
)
def test_sizes_that_are_none(sizes: object) -> None:
    edit = {"edit": "resize", "path": "conv", "sizes": sizes}
    whole = json.loads(Manifest("folded", (), (), "ab" * 32, "cd" * 32).to_json()) | {"edits": [edit]}
    with pytest.raises(FusecliError, match="damaged"):
        Manifest.from_json(json.dumps(whole), "file")
