"""Where in somebody's code a run is: the line of the forward that called into torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType

import torch
from torch import nn

_OURS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def place() -> str:
    """'net.py:12 in Gate.forward': the innermost line that is neither torch's nor ours; "" where none is.

    It is asked for inside of a run, from a mode or a hook.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    if frame is None:
        return ""
    code = frame.f_code
    owner = frame.f_locals.get("self")
    inside = f"{type(owner).__name__}.{code.co_name}" if isinstance(owner, nn.Module) else code.co_name
    return f"{_short(code.co_filename)}:{frame.f_lineno} in {inside}"


def _short(file: str) -> str:
    """The name of the file; with that of its package where it is a package's."""
    path = Path(file)
    return path.name if not (path.parent / "__init__.py").exists() else f"{path.parent.name}/{path.name}"
