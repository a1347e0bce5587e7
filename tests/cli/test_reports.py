"""The report: the same facts for people and programs, on failure too, and nothing else on stdout."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fusecli.checkpoint import sha256_file
from tests.cli.conftest import PAIR, edit, wrong_fold

FUSE = ("fuse", "model.pt", "--spec", "fuse.yaml", "--allow-code", "net.py")
KEYS = [
    "schema_version",
    "command",
    "status",
    "exit_code",
    "input",
    "output",
    "spec",
    "totals",
    "groups",
    "refused",
    "unfused",
    "verification",
    "ledger",
    "environment",
]
GROUP_KEYS = {"modules", "rule", "status", "evidence", "float64_error", "drift", "noise_floor"}


def test_the_keys_of_the_json_report(cli, digits):
    report = cli(*FUSE, "--report", "json=-").report
    assert list(report)[: len(KEYS)] == KEYS
    assert (report["schema_version"], report["command"], report["status"]) == (1, "fuse", "fused")
    assert len(report["groups"]) == 6
    assert all(group.keys() >= GROUP_KEYS for group in report["groups"])
    assert all(group["float64_error"] < 1e-12 for group in report["groups"])
    assert report["input"]["sha256"] == sha256_file(Path("model.pt"))
    assert report["spec"]["sha256"] == sha256_file(Path("fuse.yaml"))
    assert report["output"]["sha256"] == sha256_file(Path("model.fused.safetensors"))
    assert report["spec"]["bytes"] == Path("fuse.yaml").stat().st_size
    assert (report["totals"]["before"]["norms"], report["totals"]["after"]["norms"]) == (6, 0)
    assert {"fusecli", "torch", "python"} <= report["environment"].keys()


def test_several_reports_and_the_terminals_own(cli, digits):
    ended = cli(*FUSE, "--report", "json=r.json", "--report", "md=r.md")
    assert ended.code == 0
    assert "fused, equivalent" in ended.out
    assert json.loads(Path("r.json").read_text())["status"] == "fused"
    assert Path("r.md").read_text().startswith("#")
    assert not list(digits.glob(".*"))


def test_markdown_to_stdout(cli, digits):
    ended = cli(*FUSE, "--report", "md=-")
    assert ended.out.startswith("#")
    assert "fused, equivalent" in ended.err  # the terminal's own report makes room


@pytest.mark.parametrize("flag", [(), ("--allow-pickle",)])
def test_the_command_that_verifies_again_does(cli, digits, flag):
    step = cli(*FUSE, "--report", "json=-", *flag).report["next_step"]
    program, *words = shlex.split(step)
    assert program == "fusecli"
    assert words[:3] == ["verify", "model.pt", "model.fused.safetensors"]
    ended = cli(*words, "--report", "json=-")
    assert (ended.code, ended.report["status"]) == (0, "verified")
    assert ended.report["next_step"] == ""


def broken_spec(folder):
    edit(folder / "fuse.yaml", ("groups:", "grups:"))


def refused_group(folder):
    edit(folder / "fuse.yaml", ("[up.conv, up.bn, up.act]", "[pool, up.bn]"))


def no_checkpoint(folder):
    (folder / "model.pt").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "code", "status"),
    [
        (broken_spec, 2, "error"),
        (wrong_fold, 1, "different"),
        (refused_group, 4, "refused"),
        (no_checkpoint, 3, "error"),
    ],
)
def test_reports_are_written_on_failure_too(cli, digits, spoil, code, status):
    spoil(digits)
    ended = cli(*FUSE, "--report", "json=r.json", "--report", "md=r.md")
    assert ended.code == code
    report = json.loads(Path("r.json").read_text())
    assert list(report)[: len(KEYS)] == KEYS
    assert (report["exit_code"], report["status"]) == (code, status)
    assert report["input"]["path"] == "model.pt"
    assert report["spec"]["path"] == "fuse.yaml"
    assert report["output"] is None  # nothing was written
    assert report["next_step"]
    assert report["problems"] or report["refused"] or report["verification"]["reasons"]
    assert Path("r.md").read_text()
    # The same on stdout, with nothing beside it.
    assert cli(*FUSE, "--report", "json=-").report == report


def test_norms_of_groups_that_were_not_refused_are_not_called_unlisted(cli, digits):
    refused_group(digits)
    report = cli(*FUSE, "--report", "json=-").report
    codes = {norm["module"]: norm["code"] for norm in report["unfused"]}
    assert codes["up.bn"] == "no-rule"
    assert codes["stem.bn"] == "held-back"


def test_a_bare_state_dict_names_the_norms_that_stay(cli, project):
    two = PAIR.replace("bn=nn.BatchNorm2d(6)", "bn=nn.BatchNorm2d(6), last=nn.BatchNorm2d(6)")
    project(two, model=None, inputs=None, assume={"eps": 1e-5})
    report = cli("fuse", "model.pt", "--spec", "fuse.yaml", "--report", "json=-").report
    assert [(norm["module"], norm["code"]) for norm in report["unfused"]] == [("last", "not-listed")]
    assert report["totals"]["after"]["norms"] == 1


NOISY = """
import warnings
from torch import nn

print("importing")

class Noisy(nn.Conv2d):
    def forward(self, x):
        print("running")
        warnings.warn("a warning of the model's own")
        return super().forward(x)

def build():
    print("building")
    return nn.Sequential(Noisy(3, 6, 3), nn.BatchNorm2d(6))
"""


def test_stdout_carries_the_report_alone(cli, project):
    project(NOISY, groups=[["0", "1"]])
    ended = cli(*FUSE, "--report", "json=-")
    assert ended.code == 0
    assert ended.report["status"] == "fused"
    assert {"importing", "building", "running"} <= set(ended.err.splitlines())


def test_a_report_never_replaces_the_artifact(cli, digits):
    ended = cli(*FUSE, "-o", "out.pt", "--report", "json=out.pt")
    assert ended.code == 2
    assert not Path("out.pt").exists()  # told before the work
    ended = cli(*FUSE, "--report", "json=model.fused.safetensors")
    assert ended.code == 2
    assert Path("model.fused.safetensors").read_bytes()[8:9] == b"{"


def test_a_report_that_cannot_be_written_leaves_no_scraps(cli, digits, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    ended = cli(*FUSE, "--report", "json=r.json")
    assert ended.code == 2
    assert "it cannot be written (No space left on device)" in ended.err
    assert not Path("r.json").exists()
