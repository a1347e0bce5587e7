"""The model zoo of pytorchcv."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.zoo.networks import Zoo, constructors

Network = Callable[[str, str], Path]


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Two workers on two cores: a second thread for each would wait for the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def zoo(network: Network) -> Zoo:
    """The constructors of pytorchcv by name."""
    network("pytorchcv", "model_provider.py")
    return constructors()
