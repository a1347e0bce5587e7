"""Code that a spec names runs only with somebody's word."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import PAIR, edit

FUSE = ("fuse", "model.pt", "--spec", "fuse.yaml")
MARKED = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\n" + PAIR
EXECUTED = Path("executed")
ALLOWING = '[tool.fusecli]\nallow-code = ["{}"]\n'


@pytest.fixture
def folder(project):
    made = project()
    (made / "net.py").write_text(MARKED)
    return made


def test_nobody_to_ask(cli, folder):
    ended = cli(*FUSE)
    assert (ended.code, ended.out) == (3, "")
    assert "it would run Python code of the file net.py, which nobody has allowed" in ended.err
    assert "add --allow-code net.py" in ended.err
    assert not EXECUTED.exists()
    assert cli(*FUSE, "--allow-code", "net.py").code == 0  # the flag as it was printed
    assert EXECUTED.exists()


@pytest.mark.parametrize("word", ["other", "./other.py", "net", "net.py.py"])
def test_the_word_for_other_code_is_none(cli, folder, word):
    for name in ("other.py", "net.py.py"):
        Path(name).touch()
    assert cli(*FUSE, "--allow-code", word).code == 3
    assert not EXECUTED.exists()


def test_a_file_that_does_not_exist_is_a_slip(cli, folder):
    ended = cli(*FUSE, "--allow-code", "nett.py")
    assert ended.code == 2
    assert "nett.py: there is no such file to allow" in ended.err


@pytest.mark.parametrize("words", ["net.py", "other,net.py", f"other{os.pathsep}./net.py"])
def test_the_environment(cli, folder, monkeypatch, words):
    monkeypatch.setenv("FUSECLI_ALLOW_CODE", words)
    assert cli(*FUSE).code == 0


def test_the_pyproject_of_a_parent_folder(cli, folder, monkeypatch):
    (folder / "pyproject.toml").write_text(ALLOWING.format("net.py"))
    below = folder / "deep" / "deeper"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    paths = ("../../model.pt", "--spec", "../../fuse.yaml")
    assert cli("fuse", *paths).code == 0
    # The nearest one counts: a project inside does not inherit what its surroundings trust.
    (below / "pyproject.toml").write_text(ALLOWING.format("other.py"))
    assert cli("fuse", *paths, "--force").code == 3


@pytest.mark.parametrize("text", ["[tool.fusecli\n", '[tool.fusecli]\nallow-code = "net.py"\n'])
def test_a_pyproject_that_cannot_be_read(cli, folder, text):
    Path("pyproject.toml").write_text(text)
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "pyproject.toml" in ended.err


def test_a_package_covers_what_lies_in_it(cli, project):
    folder = project()
    (folder / "trustednet").mkdir()
    (folder / "trustednet" / "__init__.py").touch()
    (folder / "trustednet" / "models.py").write_text(PAIR)
    edit(folder / "fuse.yaml", ("net.py:build", "trustednet.models:build"))
    ended = cli(*FUSE)
    assert ended.code == 3
    assert "the package trustednet" in ended.err
    assert "add --allow-code trustednet" in ended.err
    assert cli(*FUSE, "--allow-code", "trusted").code == 3
    assert cli(*FUSE, "--allow-code", "trustednet").code == 0


def test_the_printed_command_carries_the_flags(cli, folder):
    report = cli(*FUSE, "--allow-code", "net.py", "--report", "json=-").report
    assert report["next_step"].endswith("--spec fuse.yaml --allow-code net.py")


BOMB = """
import torch
from pathlib import Path

class Bomb:
    def __reduce__(self):
        return (exec, ("from pathlib import Path; Path('executed').touch()",))

torch.save({"conv.weight": torch.ones(1), "bomb": Bomb()}, "model.pt")
"""


def test_a_pickle_never_runs_by_itself(cli, folder):
    exec(BOMB, {})
    ended = cli(*FUSE, "--allow-code", "net.py", "--report", "json=-")
    assert (ended.code, ended.report["exit_code"]) == (3, 3)
    assert "builtins.exec" in ended.err
    assert not EXECUTED.exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.save(torch.nn.Linear(2, 2), "model.pt"), "whole pickled module"),
        (lambda: torch.save({"a": torch.ones(1), "b": {1, 2}, "c": Path("x")}, "model.pt"), "pickle needs"),
    ],
)
def test_pickles_that_need_code_say_what_they_need(cli, folder, make, said):
    make()
    ended = cli(*FUSE, "--allow-code", "net.py")
    assert ended.code == 3
    assert said in ended.err
    assert "--allow-pickle" in ended.err


def on_a_terminal(answer: str, *words: str) -> tuple[int, str]:
    """Runs the program on a terminal of its own, answers its question, and returns exit code and screen."""
    controller, terminal = pty.openpty()
    program = [sys.executable, "-c", "from fusecli.cli import main; main()", *words]
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    process = subprocess.Popen(
        program,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
    )
    os.close(terminal)
    screen, asked, patience = b"", False, time.monotonic() + 60
    while time.monotonic() < patience:
        if not asked and b"[y/N] " in screen:
            os.write(controller, answer.encode())
            asked = True
        if select.select([controller], [], [], 0.1)[0]:
            try:
                screen += os.read(controller, 65536)
            except OSError:  # the program has closed its terminal
                break
        elif process.poll() is not None:
            break
    os.close(controller)
    return process.wait(60), screen.decode()


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 3), ("\n", 3), ("\x04", 3)])
def test_the_question(folder, answer, code):
    ended, screen = on_a_terminal(answer, *FUSE)
    assert ended == code, screen
    asked = screen.index("The spec names Python code of net.py. To run it is to trust it.")
    question = screen.index("Run it? [y/N] ")
    assert asked < question
    # Nothing repaints the line while somebody is reading it.
    assert "\x1b[2K" not in screen[asked:question]
    assert EXECUTED.exists() == (code == 0)
    if code == 0:
        assert "--allow-code" in screen  # in the command that verifies again
    else:
        assert "add --allow-code net.py" in " ".join(screen.split())


def test_ctrl_c_at_the_question(folder):
    ended, screen = on_a_terminal("\x03", *FUSE)
    assert ended == 130
    assert "interrupted; nothing was written" in screen
    assert "Traceback" not in screen
    assert not EXECUTED.exists()
