"""Where in somebody's code a run is, the line of the forward that called into torch; and where a forward
decides by sizes, which no call shows."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType

import torch
from torch import nn

_SIZES = frozenset({"shape", "ndim", "size", "dim", "numel", "nelement"})
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


@cache
def decisions_by_size(cls: type[nn.Module]) -> tuple[str, ...]:
    """'net.py:12 in Gate.forward': the lines on which the forward of a class goes one way or the other by the
    size of a tensor, as far as its text shows it.

    Sizes are plain numbers, and no mode sees them compared. An `if` that only raises decides nothing, and
    what a module holds has the same size in every run.
    """
    forward = inspect.unwrap(cls.forward)
    file = getattr(getattr(forward, "__code__", None), "co_filename", "")
    if not file or file.startswith(_OURS):
        return ()
    try:
        lines, first = inspect.getsourcelines(forward)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, ValueError):  # typed in, or made by a program
        return ()
    sizes = {
        name.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and _is_size(node.value, frozenset())
        for target in node.targets
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }
    found = sorted({test.lineno for test in _tests(tree) if _reads_size(test, frozenset(sizes))})
    return tuple(f"{_short(file)}:{first + line - 1} in {cls.__name__}.forward" for line in found)


def _tests(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        guards = isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise)
        if isinstance(node, ast.If | ast.While | ast.IfExp) and not guards:
            yield node.test


def _reads_size(node: ast.AST, sizes: frozenset[str]) -> bool:
    return any(isinstance(inner, ast.expr) and _is_size(inner, sizes) for inner in ast.walk(node))


def _is_size(node: ast.expr, sizes: frozenset[str]) -> bool:
    """Whether an expression is the size of something that is no part of the module."""
    match node:
        case ast.Name(name):
            return name in sizes
        case ast.Attribute(value, name):
            return name in _SIZES and not _is_own(value)
        case ast.Call(ast.Name("len"), [value]):
            return not _is_own(value)
        case ast.Call(ast.Name("int"), [value]) | ast.Subscript(value):
            return _is_size(value, sizes)
        case ast.Call(called):
            return isinstance(called, ast.Attribute) and _is_size(called, sizes)
        case ast.BinOp(left, _, right):
            return _is_size(left, sizes) or _is_size(right, sizes)
    return False


def _is_own(node: ast.expr) -> bool:
    """Whether it is reached through `self`."""
    while not isinstance(node, ast.Name):
        match node:
            case ast.Attribute(inner) | ast.Subscript(inner) | ast.Call(inner):
                node = inner
            case _:
                return False
    return node.id == "self"
