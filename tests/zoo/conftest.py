"""The model zoo of pytorchcv. It imports torchvision for a layer of one network, which is not built here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

Zoo = Mapping[str, Callable[[], nn.Module]]
Network = Callable[[str, str], Path]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Two workers on two cores: a second thread for each would wait for the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def zoo(network: Network, monkeypatch: pytest.MonkeyPatch) -> Zoo:
    """The constructors of pytorchcv by name, imported beside a torchvision that has one empty class."""
    network("pytorchcv", "model_provider.py")
    vision, ops = ModuleType("torchvision"), ModuleType("torchvision.ops")
    ops.DeformConv2d = type("DeformConv2d", (nn.Module,), {})  # type: ignore[attr-defined]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "torchvision", vision)
        patched.setitem(sys.modules, "torchvision.ops", ops)
        from pytorchcv.model_provider import _models
    models: Zoo = _models
    return models
