"""Records a model, or asks what its dataflow offers: with fake tensors or, if told so, with real ones."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from fusecli.engine import Offer, discover
from fusecli.graph.dataflow import Recording
from fusecli.graph.materialise import duplicate
from fusecli.graph.record import Run
from fusecli.graph.sites import layer_sites
from fusecli.rewrite import ModuleTree
from fusecli.sample import Sample

both = pytest.mark.parametrize("real", [False, True], ids=["fake", "real"])


def run_of(model: nn.Module, *args: Any, real: bool = False) -> Run:
    run = Run(model, Sample(args), lambda: duplicate(model))
    if real:
        run.recording = run._with_numbers((), None)
    return run


def recorded(model: nn.Module, *args: Any, real: bool = False) -> Recording:
    return run_of(model, *args, real=real).recording


def offered(model: nn.Module, *args: Any, real: bool = False) -> Offer:
    return discover(ModuleTree(model), run_of(model, *args, real=real))


def folds(model: nn.Module, *args: Tensor, real: bool = False) -> list[tuple[str, ...]]:
    return [group.modules for group in offered(model, *args, real=real).groups]


def left(model: nn.Module, *args: Tensor, real: bool = False) -> dict[str, str]:
    """The code of every norm that is left."""
    offer = offered(model, *args, real=real)
    return {unfused.module: unfused.code for unfused in offer.left}


def readers(recording: Recording, path: str) -> list[str]:
    """Who reads what the layer at `path` gives the first time."""
    exit_ = layer_sites(recording, path)[0].exit
    assert exit_ is not None
    return [recording.described(call) for call in recording.readers(exit_)]
