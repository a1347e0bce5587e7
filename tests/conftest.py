"""The command line, run inside this process: a subprocess would import torch anew each time."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, here and in what the tests start: the threads of two workers on two cores wait for
# each other, which makes small networks up to forty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fusecli.cli.app import main
from fusecli.consent import ENVIRONMENT, SWITCH

DIGITS = Path(__file__).parent.parent / "configs" / "digits"


@dataclass(frozen=True)
class Run:
    """How one command ended."""

    words: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def report(self) -> Any:
        """stdout as the JSON report."""
        return json.loads(self.out)


Cli = Callable[..., Run]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: Any) -> Cli:
    """Runs `fusecli WORDS` as the console script does: 80 columns, no terminal, no code allowed."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    for name in (ENVIRONMENT, SWITCH, "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    # What a command appends to the path must not reach the next test, nor the modules found there.
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*words: str | Path) -> Run:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fusecli", *map(str, words)])
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return Run(tuple(map(str, words)), int(code), out, err)

    return run


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of the digits example, whose code nobody has allowed yet."""
    folder = tmp_path / "digits"
    folder.mkdir()
    for name in ("model.pt", "fuse.yaml", "net.py", "heldout.safetensors"):
        shutil.copy(DIGITS / name, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def network() -> Callable[[str, str], Path]:
    """The path of a file in a package with a real network; skips where it is not installed, but not in CI."""

    def locate(package: str, file: str) -> Path:
        import importlib.util

        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        path = Path(folders[0]) / file if folders else None
        if path is None or not path.is_file():
            missing = f"{package} with {file} is not installed: see tests/real-networks.txt"
            if os.environ.get("CI") == "true":
                pytest.fail(missing)
            pytest.skip(missing)
        return path

    return locate
