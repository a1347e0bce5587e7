"""Case 56: a target that must not be written is refused before work; a failed write leaves nothing behind."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusecli.checkpoint import check_target, open_checkpoint, staged, write_pt, write_safetensors
from fusecli.errors import UnsafeError, UsageError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.pt"
    path.write_bytes(b"the input")
    return path


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("way", ["same", "relative", "hard link", "symbolic link", "through a linked folder"])
def test_the_output_is_the_input(tmp_path, source, monkeypatch, way, force):
    monkeypatch.chdir(tmp_path)
    target = {"same": source, "relative": Path("./in.pt")}.get(way, tmp_path / "out.pt")
    if way == "hard link":
        target.hardlink_to(source)
    elif way == "symbolic link":
        target.symlink_to(source)
    elif way == "through a linked folder":
        (tmp_path / "folder").symlink_to(tmp_path)
        target = tmp_path / "folder" / "in.pt"
    before = everything(tmp_path)
    with pytest.raises(UsageError, match="the output is the input"):
        check_target(target, source, force)
    with pytest.raises(UsageError, match="the output is the input"), staged(target, force, source):
        pass
    assert everything(tmp_path) == before


def test_the_output_is_another_file_that_is_read(tmp_path, source):
    spec = tmp_path / "fuse.yaml"
    spec.write_text("version: 1")
    with pytest.raises(UsageError, match=r"the output is the input '.*fuse.yaml'"):
        check_target(spec, source, True, [spec])


@pytest.mark.parametrize("exists", [False, True])
def test_the_output_is_a_symbolic_link(tmp_path, source, exists):
    if exists:
        (tmp_path / "elsewhere").write_text("precious")
    target = tmp_path / "out"
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeError, match="symbolic link"):
        check_target(target, source, True)


def test_the_output_is_a_folder(tmp_path, source):
    with pytest.raises(UsageError, match="a folder"):
        check_target(tmp_path, source, True)


def test_the_folder_does_not_exist_or_is_a_file(tmp_path, source):
    for folder in (tmp_path / "none", source):
        with pytest.raises(UsageError, match="does not exist"):
            check_target(folder / "out", source, False)


def test_the_output_exists(tmp_path, source):
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(UsageError, match="--force"):
        check_target(target, source, False)
    check_target(target, source, True)


def test_an_unwritable_folder(tmp_path, source, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere, whatever the bits say
    with pytest.raises(UsageError, match=r"'.*locked' cannot be written"):
        check_target(folder / "out", source, False)


def test_a_folder_that_refuses_only_when_written(tmp_path, source, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UsageError, match="Read-only file system"), staged(tmp_path / "out", False, source):
        pass


def test_commit_puts_the_file_there(tmp_path, source):
    target = tmp_path / "out"
    with staged(target, False, source) as stage:
        assert stage.path.parent == tmp_path
        assert stage.path.name.startswith(".")
        assert stage.path.name.endswith(".tmp")
        stage.path.write_text("new")
        assert not target.exists()
        stage.commit()
        assert target.read_text() == "new"
    assert sorted(everything(tmp_path)) == ["in.pt", "out"]


def test_the_target_has_the_usual_permissions(tmp_path, source):
    (tmp_path / "usual").touch()
    with staged(tmp_path / "out", False, source) as stage:
        stage.commit()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "usual").stat().st_mode
    )


def test_without_commit_nothing_changes(tmp_path, source):
    target = tmp_path / "out"
    target.write_text("old")
    before = everything(tmp_path)
    with staged(target, True, source) as stage:
        stage.path.write_text("new")
    with pytest.raises(FileExistsError), staged(target, True, source) as stage:
        stage.path.touch(exist_ok=False)
    assert everything(tmp_path) == before


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path, source):
    target = tmp_path / "out"
    with staged(target, False, source) as stage:
        target.write_text("somebody else's")
        with pytest.raises(UsageError, match="--force"):
            stage.commit()
    assert target.read_text() == "somebody else's"
    assert len(everything(tmp_path)) == 2


def test_a_very_long_name(tmp_path, source):
    target = tmp_path / ("ü" * 127)
    with staged(target, False, source) as stage:
        stage.commit()
    assert target.exists()


def write_both(path: Path, form: str) -> None:
    state = {"w": torch.ones(1 << 20)}
    if form == "pt":
        write_pt(path, state, {})
    else:
        write_safetensors(path, {"w": (torch.float32, (1 << 20,))}, state.items(), {})


SMALL_DISK = """
import resource
import signal
import sys
from pathlib import Path
from fusecli.checkpoint import staged
from fusecli.errors import UsageError
from tests.checkpoint.test_case_56_targets import write_both

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
target, source, form = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with staged(target, True, source) as stage:
        write_both(stage.path, form)
        stage.commit()
except UsageError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_a_disk_that_takes_no_more(tmp_path, source, form):
    target = tmp_path / "out"
    target.write_text("old")
    before = everything(tmp_path)
    command = [sys.executable, "-c", SMALL_DISK, str(target), str(source), form]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert f"{target}: the file could not be written" in done.stdout
    assert done.stdout.count("\n") == 1
    assert everything(tmp_path) == before


def test_a_full_disk(tmp_path, source, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    before = everything(tmp_path)
    with (
        pytest.raises(UsageError, match=r"No space left on device.*free some space"),
        staged(tmp_path / "out", False, source) as stage,
    ):
        write_both(stage.path, "safetensors")
    assert everything(tmp_path) == before


def test_short_writes_are_continued(tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: whole(handle, data[:1000], offset))
    write_both(tmp_path / "out", "safetensors")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert torch.equal(checkpoint.tensors["w"].load(), torch.ones(1 << 20))


def test_errors_that_are_not_the_disks_stay_what_they_are(tmp_path, source):
    with pytest.raises(FileNotFoundError), staged(tmp_path / "out", False, source):
        (tmp_path / "none").read_bytes()
