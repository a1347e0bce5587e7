"""A pytest plugin: with `-p tests.without_torch_ao` torch has lost torch.ao, as later releases will.

`import torch` itself loads parts of it today: those are taken away again. A test that imports it, to compare
with it, is skipped; anything else that does fails.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parent
MACHINERY = Path(importlib.util.__file__).parent
REMOVED = ("torch.ao", "torch.quantization")


class Removed(importlib.abc.MetaPathFinder):
    """Lets nobody find what is removed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if is_removed(name):
            if TESTS in importer(sys._getframe(1)).parents:
                pytest.skip(f"there is no {name} to compare with")
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def importer(frame: FrameType | None) -> Path:
    """The file whose import this is."""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if "<frozen" not in file.name and MACHINERY not in file.parents:
            return file
        frame = frame.f_back
    raise AssertionError("nobody imports this")


def is_removed(name: str) -> bool:
    return any(name == gone or name.startswith(f"{gone}.") for gone in REMOVED)


def remove() -> None:
    for name in [name for name in sys.modules if is_removed(name)]:
        del sys.modules[name]
    for gone in REMOVED:
        vars(torch).pop(gone.rpartition(".")[2], None)
    sys.meta_path.insert(0, Removed())


remove()
