"""Records a model, or asks what its dataflow offers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusecli.engine import Offer, discover
from fusecli.graph.dataflow import Recording
from fusecli.graph.materialise import duplicate
from fusecli.graph.record import Run
from fusecli.graph.sites import layer_sites
from fusecli.rewrite import ModuleTree
from fusecli.sample import Sample


def run_of(model: nn.Module, *args: Any) -> Run:
    return Run(model, Sample(args), lambda: duplicate(model))


def recorded(model: nn.Module, *args: Any) -> Recording:
    return run_of(model, *args).recording


def offered(model: nn.Module, *args: Any) -> Offer:
    return discover(ModuleTree(model), run_of(model, *args))


def folds(model: nn.Module, *args: Tensor) -> list[tuple[str, ...]]:
    return [group.modules for group in offered(model, *args).groups]


def left(model: nn.Module, *args: Tensor) -> dict[str, str]:
    """The code of every norm that is left."""
    offer = offered(model, *args)
    return {unfused.module: unfused.code for unfused in offer.left}


def readers(recording: Recording, path: str) -> list[str]:
    """Who reads what the layer at `path` gives the first time."""
    exit_ = layer_sites(recording, path)[0].exit
    assert exit_ is not None
    return [recording.described(call) for call in recording.readers(exit_)]
