"""The model zoo of pytorchcv."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.threads import one_thread
from tests.zoo.networks import Zoo, constructors

__all__ = ["one_thread", "zoo"]

Network = Callable[[str, str], Path]


@pytest.fixture
def zoo(network: Network) -> Zoo:
    """The constructors of pytorchcv by name."""
    network("pytorchcv", "model_provider.py")
    return constructors()
