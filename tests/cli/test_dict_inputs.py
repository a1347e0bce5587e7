"""A forward that takes a dict: in a spec, on the command line, in a plan that is written back, in int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import fusecli
from fusecli.spec import read_spec

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.side, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, batch, scale=None):
        image, (side, more) = batch["image"], batch["extra"]["pair"]
        y = self.bn(self.conv(image)).mean((2, 3)) + self.norm(self.side(side)) + more
        return {"y": y if scale is None else y * scale}

build = Net
"""
FLAT = NET.replace('batch["extra"]["pair"]', '(batch["file"], 0.5)')
GROUPS = [["conv", "bn"], ["side", "norm"]]
NESTED: list[Any] = [
    {
        "image": {"shape": [2, 3, 8, 8]},
        "extra": {"pair": [{"shape": [2, 4]}, {"shape": [2, 6]}]},
    }
]
SPEC = ("--spec", "fuse.yaml", "--allow-code", "net.py")
FUSED = Path("model.fused.safetensors")


@pytest.mark.parametrize("more", [[], [{"shape": [6], "name": "scale"}]], ids=["alone", "with a keyword"])
def test_a_dict_of_a_spec(cli, project, more):
    project(NET, GROUPS, [*NESTED, *more])
    ended = cli("fuse", "model.pt", *SPEC, "--report", "json=-")
    assert ended.code == 0
    assert ended.report["verification"]["end_to_end"]
    assert {group["evidence"] for group in ended.report["groups"]} == {"observed"}
    assert cli("verify", "model.pt", FUSED, *SPEC).code == 0


def test_a_dict_on_the_command_line(cli, project):
    """One of its names is a key of an entry, too."""
    project(FLAT, GROUPS)
    words = ("--model", "net.py:build", "--input", "image=2x3x8x8,file=2x4")
    ended = cli("fuse", "model.pt", "--discover", *words)
    assert (ended.code, ended.err) == (0, "")
    assert "2 groups" in ended.out
    assert cli("verify", "model.pt", FUSED, *words).code == 0


@pytest.mark.parametrize("source", [NET, FLAT], ids=["nested", "flat"])
def test_a_plan_writes_a_dict_that_is_read_again(cli, project, source):
    folder = project(
        source, None, NESTED if source == NET else [{"image": NESTED[0]["image"], "file": {"shape": [2, 4]}}]
    )
    (folder / "plans").mkdir()
    ended = cli("plan", "model.pt", *SPEC, "-o", "plans/found.yaml")
    assert ended.code == 0
    assert read_spec("plans/found.yaml").inputs == read_spec("fuse.yaml").inputs
    assert cli("fuse", "model.pt", "--spec", "plans/found.yaml", "--allow-code", "net.py").code == 0


def test_files_inside_a_dict_are_read_from_the_folder_of_the_spec(cli, project):
    folder = project(
        FLAT, None, [{"image": {"file": "data.safetensors", "key": "x"}, "file": {"shape": [2, 4]}}]
    )
    save_file({"x": torch.randn(2, 3, 8, 8)}, "data.safetensors")
    (folder / "plans").mkdir()
    assert cli("plan", "model.pt", *SPEC, "-o", "plans/found.yaml").code == 0
    (entry,) = yaml.safe_load(Path("plans/found.yaml").read_text())["inputs"]
    assert entry["image"]["file"] == "../data.safetensors"
    again = ("fuse", "model.pt", "--spec", "plans/found.yaml", "--allow-code", "net.py")
    assert cli(*again).code == 0
    # A file that is read is never written to, however deep it is named.
    ended = cli(*again, "--report", "json=data.safetensors")
    assert ended.code == 2
    assert "a report cannot replace a file of the command itself" in ended.err


def test_a_dict_calibrates_int8(cli, project):
    pytest.importorskip("torchao")
    data = {"x": torch.randn(40, 3, 8, 8), "s": torch.randn(40, 4)}
    held = [
        {"image": {"file": "data.safetensors", "key": "x"}, "file": {"file": "data.safetensors", "key": "s"}}
    ]
    quantize = {"calibrate": held, "batch": 16, "threshold": {"cosine": 0.9}}
    project(FLAT, GROUPS, held, quantize=quantize)
    save_file(data, "data.safetensors")
    ended = cli(
        "quantize", "model.pt", *SPEC, "--format", "safetensors", "-o", "o.safetensors", "--report", "json=-"
    )
    # 40 rows of both files, 16 at once.
    assert (ended.code, ended.report["quantization"]["samples"]) == (0, 3)
    assert cli("verify", "model.pt", "o.safetensors", *SPEC).code == 0


def test_a_dict_without_a_name_that_forward_asks_for(cli, project):
    project(NET, GROUPS, [{"image": {"shape": [2, 3, 8, 8]}}])
    ended = cli("fuse", "model.pt", *SPEC)
    assert ended.code == 2
    assert "net.py:" in ended.err
    assert "KeyError: 'extra'" in ended.err
    assert "if its inputs are wrong, give one entry per forward argument" in ended.err


def test_a_dict_in_python(project):
    """There a dict is by keyword; in a tuple it is an argument."""
    project(NET, GROUPS, NESTED)
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(NET, "net.py", "exec"), names)
    model = names["build"]()
    model.load_state_dict(torch.load("model.pt"))
    model.eval()
    batch = {"image": torch.randn(2, 3, 8, 8), "extra": {"pair": (torch.randn(2, 4), torch.randn(2, 6))}}
    outcome = fusecli.fuse(model, (batch,), groups=GROUPS)
    assert outcome.status == "fused"
    assert fusecli.verify(model, outcome.model, (batch,)).equivalent
    assert fusecli.fuse(model, {"batch": batch, "scale": torch.randn(6)}, groups=GROUPS).status == "fused"
