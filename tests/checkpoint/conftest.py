"""Small state dicts to save, and the real networks where their packages are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A conv and a norm, in several dtypes."""
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "conv.bias": torch.randn(4, generator=generator).double(),
        "bn.running_mean": torch.randn(4, generator=generator).half(),
        "bn.num_batches_tracked": torch.tensor(7),
    }


@pytest.fixture
def trained() -> Callable[[str, str], Path]:
    """The path of a file inside an installed package; the test is skipped where it is not installed."""

    def locate(package: str, file: str) -> Path:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"{package} is not installed")
        path = Path(next(iter(spec.submodule_search_locations))) / file
        if not path.exists():
            pytest.skip(f"this {package} has no {file}")
        return path

    return locate
