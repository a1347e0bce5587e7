"""Whose mistake an exception of somebody's code is: of that code, or of what it was called with.

A forward that raises was given inputs that do not fit it, or is wrong itself. The traceback tells: where the
last line of the model's own code stands, and whether that line is a raise or called what has raised. What is
in doubt names both.
"""

from __future__ import annotations

import dis
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fusecli.errors import Problem

_INPUTS = "give one entry per forward argument, with the shape and dtype it expects"
_PACKAGE = str(Path(__file__).parent) + os.sep
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep
_INSTALLED = {"site-packages", "dist-packages"}
_GENERATED = ("<frozen", "<eval_with_key>")  # by Python's importlib and by torch.fx
_RAISES = dis.opmap["RAISE_VARARGS"]  # an assert is one, too
# These are wrong whatever forward is given.
_OF_THE_CODE = (NameError, ImportError, SyntaxError, ZeroDivisionError, RecursionError, OSError)
# What torch and other libraries raise about sizes, dtypes and values.
_OF_VALUES = (RuntimeError, ValueError, IndexError, AssertionError)
_OF_DEVICES = ("CUDA", "NVIDIA", "on the same device", "expected device", "cuda:")
_OF_GRADIENTS = ("does not require grad", "does not have a grad_fn")
_GIVEN = {"Tensor", "tuple", "list", "dict"}  # what the arguments of a forward are
_CALLS = str(Path("nn", "modules", "module.py"))
_MODULE = ("torch.nn.modules.module", "Module")
_MOST = 500  # characters of a message: some quote a whole tensor


@dataclass(frozen=True)
class _Frame:
    """One line of a traceback.

    raises       it is a raise itself
    of_a_module  it stands in a method of an nn.Module, or in a function that is given one first, as hooks are
    """

    file: str
    line: int
    raises: bool
    of_a_module: bool

    @property
    def place(self) -> str:
        near = os.path.relpath(self.file) if Path(self.file).is_absolute() else ".."
        return f"{self.file if near.startswith('..') else near}:{self.line}"

    @property
    def installed(self) -> bool:
        return not _INSTALLED.isdisjoint(Path(self.file).parts)

    @property
    def nobodys(self) -> bool:
        """Whether it is no part of a model: torch, the standard library, fusecli."""
        torch = getattr(sys.modules.get("torch"), "__file__", None) or _PACKAGE
        ours = (_PACKAGE, f"{Path(torch).parent}{os.sep}", *_GENERATED)
        return self.file.startswith(ours) or (self.file.startswith(_STANDARD) and not self.installed)


def forward_failed(error: BaseException, where: str = "inputs", fix: str = _INPUTS) -> Problem:
    """The problem that a forward has raised `error`: at the line of the model's code if it is about that,
    else at `where`, with what to do about the inputs (`fix`)."""
    frames = _frames(error.__traceback__)
    own = _own(frames)
    said = described(error)
    unfit = f"the model does not run on these inputs: {said}"
    if 'missing the required "forward"' in said:
        return Problem(f"the model cannot be called: {said}", "model", "name what builds a whole model")
    if own is None:
        return Problem(unfit, where, fix)
    if any(word in str(error) for word in _OF_DEVICES):
        mend = "fusecli runs models on the CPU: let forward use the device of what it is given"
        return Problem(f"the model does not run on the CPU: {said}", own.place, mend)
    if any(word in str(error) for word in _OF_GRADIENTS):
        mend = "forward is run without gradients, as at inference: take what needs them out of it"
        return Problem(f"the model does not run without gradients: {said}", own.place, mend)
    by_hand = own is frames[-1] and own.raises
    if _of_the_code(error, by_hand):
        mend = "this is in the model's code, whatever its inputs are: mend it there"
        return Problem(f"the model's code raises {said}", own.place, mend)
    if by_hand:
        return Problem(unfit, own.place, f"this line refuses what it is given: {fix}; or mend it there")
    if isinstance(error, _OF_VALUES) or _of_an_op(error, frames[-1]):
        return Problem(f"{unfit} (at {own.place})", where, fix)
    return Problem(
        f"the model's code raises {said}", own.place, f"mend it there; or, if its inputs are wrong, {fix}"
    )


def code_failed(error: BaseException, what: str, where: str, fix: str) -> Problem:
    """The problem that `what`, code that the user named, has raised `error`: with the line of it, and `fix`,
    what to do about how it was called, where that may be wrong."""
    own = _own(_frames(error.__traceback__))
    said = f"{what} raised {described_with_place(error)}"
    if own is None:
        return Problem(said, where, fix)
    if any(word in str(error) for word in _OF_DEVICES):
        return Problem(said, where, "fusecli builds models on the CPU: take the device out of that code")
    mend = "mend it there" if _of_the_code(error, by_hand=False) else f"{fix}, or mend it there"
    return Problem(said, where, mend)


def model_failed(error: BaseException) -> Problem | None:
    """The problem that a method of a model, or a hook on one, has raised `error` where no forward was run;
    None where it was none of them: then it is a bug of ours."""
    frames = _frames(error.__traceback__)
    ours = [frame for frame in frames if frame.file.startswith(_PACKAGE) or not frame.nobodys]
    if not ours or ours[-1].nobodys or not ours[-1].of_a_module:
        return None
    fix = "this is in the model's code: mend it there, or build the model without it"
    return Problem(f"the model's code raises {described(error)}", ours[-1].place, fix)


def described(error: BaseException) -> str:
    """The kind of an exception and the first line it says: torch goes on in paragraphs, for developers."""
    lines = str(error).strip().splitlines()
    first = lines[0].strip()[:_MOST] if lines else ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def described_with_place(error: BaseException) -> str:
    """What `described` says, and the line of the user's code that it comes from."""
    own = _own(_frames(error.__traceback__))
    return f"{described(error)} (at {own.place})" if own is not None else described(error)


def _of_the_code(error: BaseException, by_hand: bool) -> bool:
    if isinstance(error, _OF_THE_CODE) or (by_hand and isinstance(error, NotImplementedError)):
        return True
    if not isinstance(error, AttributeError) or error.name is None:
        return False
    return _GIVEN.isdisjoint(kind.__name__ for kind in type(error.obj).__mro__)


def _of_an_op(error: BaseException, last: _Frame) -> bool:
    """A function of torch was given another type; to call a layer in a wrong way is the code's."""
    return isinstance(error, TypeError) and last.nobodys and not last.file.endswith(_CALLS)


def _frames(trace: TracebackType | None) -> list[_Frame]:
    found = []
    while trace is not None:
        frame, code, at = trace.tb_frame, trace.tb_frame.f_code, trace.tb_lasti
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        kinds = {(kind.__module__, kind.__name__) for kind in type(first).__mro__}
        raises = 0 <= at < len(code.co_code) and code.co_code[at] == _RAISES
        found.append(_Frame(code.co_filename, trace.tb_lineno, raises, _MODULE in kinds))
        trace = trace.tb_next
    return found


def _own(frames: Sequence[_Frame]) -> _Frame | None:
    """The last line of the model's code: of the user's files, else of the package that the model is from."""
    theirs = [frame for frame in frames if not frame.nobodys]
    return next(reversed([frame for frame in theirs if not frame.installed] or theirs), None)
