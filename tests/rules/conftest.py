from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

TorchAo = Callable[..., Any]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The layers are so small that waking a second thread costs more than their work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torch_ao() -> TorchAo:
    """torch.ao.quantization.fuse_modules; deprecated, so its warnings are no news. Skips where it is gone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torch.ao.quantization")

    def fuse(model: nn.Module, names: object, **options: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return quantization.fuse_modules(model, names, **options)

    return fuse
