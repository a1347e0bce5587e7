"""Case 57: kill -9 during a write leaves the target absent, or as it was."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from fusecli.checkpoint import open_checkpoint

SLOW_WRITE = """
import sys
import time
from pathlib import Path

import torch

from fusecli.checkpoint import staged, write_safetensors

target, source, last = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
layout = {f"w{number}": (torch.float32, (1000,)) for number in range(8)}


def produce():
    for number, name in enumerate(layout):
        if number == 5 and last == "in the middle":
            print("ready", flush=True)
            time.sleep(600)
        yield name, torch.full((1000,), float(number))


with staged(target, True, source) as stage:
    write_safetensors(stage.path, layout, produce(), {})
    if last == "before the commit":
        print("ready", flush=True)
        time.sleep(600)
    stage.commit()
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("old", [None, b"the old artifact, whole"])
@pytest.mark.parametrize("moment", ["in the middle", "before the commit", "after the commit"])
def test_kill_during_a_write(tmp_path, old, moment):
    target, source = tmp_path / "out.safetensors", tmp_path / "in.pt"
    source.write_bytes(b"the input")
    if old:
        target.write_bytes(old)
    command = [sys.executable, "-c", SLOW_WRITE, str(target), str(source), moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    if moment == "after the commit":
        with open_checkpoint(target) as checkpoint:
            assert [stored.load()[-1] for stored in checkpoint.tensors.values()] == list(range(8))
    else:
        assert (target.read_bytes() if target.exists() else None) == old
    assert source.read_bytes() == b"the input"
