"""What torch.ao says to the same question; deprecated, so its warnings are no news."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn


@contextmanager
def torch_ao() -> Iterator[Any]:
    """torch.ao.quantization, which may be used inside the block; the test is skipped where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = importlib.import_module("torch.ao.quantization")
        except ModuleNotFoundError:
            pytest.skip("this torch has no torch.ao")
        yield found


def prepared_by_torch_ao(layer: nn.Module, backend: str = "fbgemm", version: int = 0) -> nn.Sequential:
    """A copy of a layer, or of a container's members, fused and prepared by torch.ao in train mode."""
    members = [*copy.deepcopy(layer)] if isinstance(layer, nn.Sequential) else [copy.deepcopy(layer)]
    with torch_ao() as ao:
        float_nn, float_qat, fused, fused_qat = (
            importlib.import_module(f"torch.{name}")
            for name in ("nn", "ao.nn.qat", "ao.nn.intrinsic", "ao.nn.intrinsic.qat")
        )
        mapping = {
            **ao.get_default_qat_module_mappings(),
            # They exist, but are not used unless asked for.
            float_nn.Conv1d: float_qat.Conv1d,
            fused.ConvReLU1d: fused_qat.ConvReLU1d,
        }
        model = nn.Sequential(*members).train()
        if len(members) > 1:
            model = ao.fuse_modules_qat(model, [str(number) for number in range(len(members))])
        model.qconfig = ao.get_default_qat_qconfig(backend, version)
        return ao.prepare_qat(model, mapping=mapping)  # type: ignore[no-any-return]
