"""The artifact: written whole or not at all, the same bytes each time, and never over a file that is read."""

from __future__ import annotations

import functools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fusecli.checkpoint import open_checkpoint, sha256_file
from fusecli.checkpoint.pickled import load_pickled
from tests.cli.conftest import edit, wrong_fold

FUSE = ("fuse", "model.pt", "--spec", "fuse.yaml", "--allow-code", "net.py")
FUSED = Path("model.fused.safetensors")
PROGRAM = "from fusecli.cli import main\nmain()\n"


def everything(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir() if path.is_file()}


def test_the_inputs_are_never_touched(cli, digits):
    before = {path: (path.stat().st_mtime_ns, sha256_file(path)) for path in digits.iterdir()}
    assert cli(*FUSE).code == 0
    assert cli("verify", "model.pt", FUSED, "--spec", "fuse.yaml", "--allow-code", "net.py").code == 0
    new = set(digits.iterdir()) - before.keys() - {digits / "__pycache__"}
    assert new == {digits / FUSED}
    assert {path: (path.stat().st_mtime_ns, sha256_file(path)) for path in before} == before


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_the_same_bytes_each_time_and_under_each_name(cli, digits, suffix):
    (digits / "sub").mkdir()
    names = [Path(f"a.{suffix}"), Path("sub") / f"another name.{suffix}"]
    for name in names:
        assert cli(*FUSE, "-o", name).code == 0
    first = names[0].read_bytes()
    assert names[1].read_bytes() == first
    assert cli(*FUSE, "-o", names[0], "--force").code == 0
    assert names[0].read_bytes() == first
    for secret in (str(digits), os.environ.get("HOME", "/root") + "/"):
        assert secret.encode() not in first


def test_two_processes_write_the_same_bytes(cli, digits):
    assert cli(*FUSE).code == 0
    for number in ("1", "2"):
        command = [sys.executable, "-c", PROGRAM, *FUSE, "-q", "-o", f"{number}.safetensors"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": number})
        assert Path(f"{number}.safetensors").read_bytes() == FUSED.read_bytes()


@pytest.mark.parametrize(
    ("words", "form"),
    [
        ((), "safetensors"),
        (("-o", "x.pt"), "zip pickle"),
        (("-o", "x.pth"), "zip pickle"),
        (("-o", "x"), "safetensors"),
        (("--format", "pt"), "zip pickle"),
        (("-o", "x.pt", "--format", "safetensors"), "safetensors"),
    ],
)
def test_the_format(cli, digits, words, form):
    report = cli(*FUSE, *words, "--report", "json=-").report
    assert report["output"]["format"] == form
    with open_checkpoint(report["output"]["path"]) as checkpoint:
        assert checkpoint.format == form


def test_dry_run_does_all_but_leave_a_file(cli, digits):
    before = everything(digits)
    ended = cli(*FUSE, "--dry-run", "--report", "json=-")
    assert (ended.code, ended.report["status"]) == (0, "planned")
    assert ended.report["verification"]["judgement"] == "equivalent"
    assert ended.report["next_step"] == "without --dry-run this writes model.fused.safetensors"
    assert everything(digits) == before
    assert cli(*FUSE).code == 0
    assert sha256_file(FUSED) == ended.report["output"]["sha256"]
    assert cli(*FUSE, "--dry-run").code == 0  # an existing output is no obstacle, it is not replaced


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (None, 1),
        (("stem.bn", "stem.bm"), 2),
        (("[up.conv, up.bn, up.act]", "[pool, up.bn]"), 4),
        (('["blocks.*.conv", "blocks.*.bn"]', "[blocks.0.conv, blocks.1.bn]"), 4),
    ],
)
def test_dry_run_exits_the_same_way(cli, digits, change, code):
    if change:
        edit(digits / "fuse.yaml", change)
    else:
        wrong_fold(digits)
    before = everything(digits)
    assert cli(*FUSE, "--dry-run").code == code
    assert cli(*FUSE).code == code
    assert everything(digits) == before


def test_force_replaces_and_nothing_else_does(cli, digits):
    FUSED.write_text("precious")
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "the output exists already" in ended.err
    assert "--force" in ended.err
    assert FUSED.read_text() == "precious"
    assert cli(*FUSE, "--force").code == 0
    assert FUSED.stat().st_size > 8


def test_a_failed_proof_leaves_the_old_file(cli, digits):
    FUSED.write_text("precious")
    wrong_fold(digits)
    assert cli(*FUSE, "--force").code == 1
    assert FUSED.read_text() == "precious"


class TestCase56:
    """A target that must not be written is refused before work; the inputs stay as they are."""

    @pytest.mark.parametrize("name", ["model.pt", "./model.pt", "fuse.yaml", "net.py", "heldout.safetensors"])
    def test_the_output_is_a_file_that_is_read(self, cli, digits, name):
        before = everything(digits)
        ended = cli(*FUSE, "-o", name, "--force")
        assert ended.code == 2
        assert "the output is the input" in ended.err
        assert everything(digits) == before

    def test_the_output_is_a_symbolic_link(self, cli, digits):
        FUSED.symlink_to(digits / "elsewhere")
        assert cli(*FUSE, "--force").code == 3
        assert not Path("elsewhere").exists()

    def test_the_output_is_a_folder_or_in_none(self, cli, digits):
        assert cli(*FUSE, "-o", ".").code == 2
        assert "does not exist" in cli(*FUSE, "-o", "none/x.pt").err

    def test_an_unwritable_folder(self, cli, digits, monkeypatch):
        # root may write anywhere, so the answer of the system is made up
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
        ended = cli(*FUSE)
        assert ended.code == 2
        assert "cannot be written (permission denied)" in ended.err

    def test_a_full_disk(self, digits):
        def small_files_only():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        before = everything(digits)
        ended = subprocess.run(
            [sys.executable, "-B", "-c", PROGRAM, *FUSE],
            preexec_fn=small_files_only,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 2, ended.stderr
        assert "the file could not be written" in ended.stderr
        assert "nothing was left behind" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert everything(digits) == before


# Stops where the staged file is on disk and being proven.
STOPPING = """
import time
import fusecli.commands.fuse as job
def wait(*_):
    print("staged", flush=True)
    time.sleep(600)
job.prove = wait
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("old", [None, "the old artifact, whole"])
def test_case_57_killed_while_fusing(digits, end, old):
    if old:
        FUSED.write_text(old)
    before = everything(digits)
    command = [sys.executable, "-B", "-c", STOPPING + PROGRAM, *FUSE, "--force"]
    # A job that a shell has put into the background ignores Ctrl-C, and so do its children.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeding) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "staged\n"  # stdout is the report's alone
        time.sleep(0.2)
        process.send_signal(end)
        rest = process.stderr.read()
    after = everything(digits)
    if end is signal.SIGINT:
        assert process.returncode == 130
        assert rest == "interrupted; nothing was written\n"
        assert after == before
    else:
        assert process.returncode == -signal.SIGKILL
        # What is left is the staged file, hidden and under no name that anybody loads.
        assert all(name.startswith(".model.fused") for name in after.keys() - before.keys())
        assert {name: after[name] for name in before} == before


def test_what_is_no_file_is_not_replaced(cli, digits):
    os.mkfifo("pipe")
    ended = cli(*FUSE, "-o", "pipe", "--force")
    assert (ended.code, "no ordinary file" in ended.err) == (2, True)
    ended = cli("plan", *FUSE[1:], "-o", "found.yaml", "--graph", "pipe", "--force")
    assert (ended.code, "no ordinary file" in ended.err) == (2, True)
    assert Path("pipe").is_fifo()


@pytest.mark.parametrize("command", ["fuse", "verify", "plan", "quantize"])
def test_each_file_is_opened_once(cli, digits, monkeypatch, command):
    """A legacy pickle is read whole when it is opened."""
    state = torch.load("model.pt", weights_only=True)
    torch.save(state, "model.pt", _use_new_zipfile_serialization=False)
    words = ["--spec", "fuse.yaml", "--allow-code", "net.py"]
    files = ["model.pt"]
    if command == "verify":
        assert cli("fuse", "model.pt", *words, "-o", "fused.pt").code == 0
        files = ["model.pt", "fused.pt"]
    opened = []

    def noting(path, *others):
        opened.append(path.name)
        return load_pickled(path, *others)

    monkeypatch.setattr("fusecli.checkpoint.opening.load_pickled", noting)
    ended = cli(command, *files, *words, *(["--dry-run"] if command in ("fuse", "quantize") else []))
    assert ended.code == 0, ended.err
    assert sorted(opened) == sorted(files)
