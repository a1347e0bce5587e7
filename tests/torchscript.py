"""TorchScript, which users have and torch deprecates, by a category of warning that changes with releases."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def scripted(what: Any) -> Any:
    """`torch.jit.script` of a module or a function."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.")
        return torch.jit.script(what)
