"""Why a pickle was not loaded, in one sentence that names the culprit."""

from __future__ import annotations

import re
from pathlib import Path

from fusecli.checkpoint.scan import Scan
from fusecli.checkpoint.trouble import DOWNLOAD_AGAIN, RESAVE, first_line, unreadable
from fusecli.errors import UnsafeError

_CONSENT = "--allow-pickle loads it and runs the code it names, so only for a file you trust"
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
# Never part of weights: a file that names one of these was made to run commands when it is loaded.
_COMMANDS = {
    "os",
    "posix",
    "nt",
    "sys",
    "subprocess",
    "runpy",
    "pty",
    "socket",
    "shutil",
    "ctypes",
    "importlib",
}
_BUILTIN_COMMANDS = {
    "builtins.eval",
    "builtins.exec",
    "builtins.compile",
    "builtins.__import__",
    "builtins.open",
}


def explain_refusal(path: Path, scan: Scan, error: Exception | None) -> UnsafeError:
    """The error for a pickle that the safe unpickler will not load (`error`: what it said)."""
    for name in scan.globals:
        if name.split(".")[0] in _COMMANDS or name in _BUILTIN_COMMANDS:
            what = f"loading this pickle would run {name}; it was not loaded"
            return unreadable(path, what, "do not trust this file: get the weights as safetensors")
    culprit = _culprit(scan, error)
    if scan.holds_module:
        what = f"holds a whole pickled module (class {scan.root_class or culprit}), not a state dict"
    elif error is None:
        what = "is a plain pickle, not written by torch.save, so it cannot be loaded without running its code"
    elif culprit:
        what = f"its pickle needs {culprit}, which is no part of plain weights"
    else:
        what = f"torch's safe unpickler cannot read this pickle ({_said(error)})"
    return unreadable(path, what, f"{RESAVE}; or {_CONSENT}")


def _culprit(scan: Scan, error: Exception | None) -> str:
    """The refused global by its full name: torch drops 'builtins.' from it."""
    found = _REFUSED.search(str(error))
    name = found.group(1) if found else ""
    return f"builtins.{name}" if f"builtins.{name}" in scan.globals else name


def _way_to(module: str) -> str:
    """How the code that a pickle names is found: a console script does not see the folder it is run in."""
    file, folder = Path(f"{module}.py"), Path(module)
    if file.is_file() or folder.is_dir():
        return f"if the one in this folder is meant, add --allow-code {file if file.is_file() else module}"
    return "install the package that provides it, or name its file or package with --allow-code"


def _said(error: Exception) -> str:
    return (
        re.sub(r"\s+", " ", str(error).rsplit("WeightsUnpickler error:", 1)[-1])
        .split("Check the doc")[0]
        .strip()
    )


def explain_failure(path: Path, error: Exception) -> UnsafeError:
    """The error for a file that broke while it was loaded, with or without consent."""
    if isinstance(error, ModuleNotFoundError):
        what = f"the pickle needs the module '{error.name}', which is not installed"
        return unreadable(path, what, _way_to(str(error.name).partition(".")[0]))
    if isinstance(error, (ImportError, AttributeError)):
        fix = f"run where its class is defined and {RESAVE}"
        return unreadable(path, f"a class that the pickle names cannot be found ({first_line(error)})", fix)
    return unreadable(path, f"the file cannot be loaded ({first_line(error)})", DOWNLOAD_AGAIN)
