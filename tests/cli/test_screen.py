"""What a person sees: 80 columns, no colour where none is wanted, no traceback for a slip of theirs."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import pytest
from rich.cells import cell_len

from fusecli.cli.screen import dialogue
from tests.cli.conftest import edit, wrong_fold

FUSE = ("fuse", "model.pt", "--spec", "fuse.yaml", "--allow-code", "net.py")


@pytest.mark.parametrize(
    "words",
    [
        FUSE,
        ("rules",),
        ("rules", "conv_bn"),
        ("explain",),
        ("explain", "bn-axis"),
        ("fuse", "--help"),
        ("--help",),
    ],
    ids=" ".join,
)
def test_80_columns(cli, digits, words):
    ended = cli(*words)
    assert ended.code == 0
    assert max(cell_len(line) for line in ended.out.splitlines()) <= 80


def test_no_color(cli, digits, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[3" in cli(*FUSE, "--dry-run").out
    monkeypatch.setenv("NO_COLOR", "1")
    plain = cli(*FUSE, "--dry-run").out
    assert "\x1b[3" not in plain
    assert "✓" in plain


def test_quiet_says_nothing(cli, digits):
    ended = cli(*FUSE, "--quiet")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    ended = cli(*FUSE, "-q")
    assert ended.code == 2
    assert "the output exists already\n  fix: use --force" in ended.err


def test_quiet_says_nothing_but_why_it_failed(cli, digits):
    wrong_fold(digits)
    ended = cli(*FUSE, "-q", "--force")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("different: head.linear + head.bn + head.relu: relative error")
    edit(digits / "fuse.yaml", ("[up.conv, up.bn, up.act]", "[pool, up.bn]"))
    ended = cli(*FUSE, "-q", "--force")
    assert ended.err == "refused: pool + up.bn: no-rule: no rule fuses AvgPool2d -> BatchNorm2d\n"


def test_debug_shows_the_traceback(cli, digits):
    edit(digits / "fuse.yaml", ("net.py:build", "net.py:torch"))
    plain, debug = cli(*FUSE), cli(*FUSE, "--debug")
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err
    assert plain.err in debug.err


def test_messages_of_somebodys_code_stay_one_line(cli, project):
    folder = project()
    (folder / "net.py").write_text(r"def build(): raise RuntimeError('first\n::error::second\x1b[31m')")
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "\x1b" not in ended.err
    assert len(ended.err.splitlines()) == 2
    assert not any(line.startswith("::") for line in ended.err.splitlines())


def test_a_reader_that_leaves_changes_nothing(digits):
    command = [sys.executable, "-c", "from fusecli.cli import main; main()", *FUSE]
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (digits / "model.fused.safetensors").is_file()


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_while_a_library_is_kept_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchao prints is sent elsewhere for as long as it runs, which is when progress is wanted."""
    terminal, elsewhere = Tty(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with dialogue(quiet=False) as person, contextlib.redirect_stderr(elsewhere):
        print("noise", file=sys.stderr)
        person.progress("calibrating, batch 3 of 20")
        assert person.status is not None
        person.status._live.refresh()
        shown = terminal.getvalue()  # before the end, when all is shown once more
    assert "calibrating, batch 3 of 20" in shown
    assert elsewhere.getvalue() == "noise\n"
