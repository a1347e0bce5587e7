from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from tests.threads import one_thread

__all__ = ["TorchAo", "one_thread", "torch_ao"]
TorchAo = Callable[..., Any]


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
