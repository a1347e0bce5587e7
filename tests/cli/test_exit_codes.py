"""Every exit code is reached from the command line, and means what the README says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.conftest import PAIR, edit, wrong_fold

FUSE = ("fuse", "model.pt", "--spec", "fuse.yaml", "--allow-code", "net.py")
FUSED = Path("model.fused.safetensors")
SWAPPED = [["blocks.0.conv", "blocks.1.bn"], ["blocks.1.conv", "blocks.0.bn"]]


def test_0_fused_verified_written(cli, digits):
    ended = cli(*FUSE)
    assert (ended.code, ended.err) == (0, "")
    assert "fused, equivalent" in ended.out
    assert FUSED.is_file()
    ended = cli("verify", "model.pt", FUSED, "--spec", "fuse.yaml", "--allow-code", "net.py")
    assert (ended.code, ended.err) == (0, "")
    assert "verified, equivalent" in ended.out


def test_1_outputs_differ(cli, digits):
    wrong_fold(digits)
    ended = cli(*FUSE)
    assert ended.code == 1
    assert "first at head.linear + head.bn + head.relu" in ended.out
    assert not FUSED.exists()


def test_1_verify_against_another_checkpoint(cli, digits):
    assert cli(*FUSE).code == 0
    checkpoint = torch.load("model.pt", weights_only=True)
    checkpoint["model_state_dict"]["stem.bn.weight"][0] *= -1
    torch.save(checkpoint, "model.pt")
    for spec in ((), ("--spec", "fuse.yaml", "--allow-code", "net.py")):
        ended = cli("verify", "model.pt", FUSED, *spec)
        assert ended.code == 1
        said = " ".join(ended.out.split())
        assert "different: not the same function" in said
        assert "stem.conv.0.weight" in said
        assert "is not the file that the artifact was made from" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fuse"], "Missing argument 'checkpoint'"),
        (["fuse", "model.pt"], "nothing says what to fuse"),
        (["fuse", "none.pt", "--spec", "fuse.yaml"], "there is no such file"),
        (["fuse", ".", "--spec", "fuse.yaml"], "is a folder"),
        (["fuse", "model.pt", "--spec", "none.yaml"], "did you mean 'fuse.yaml'?"),
        ([*FUSE, "--samples", "0"], "--samples"),
        ([*FUSE, "--seed", str(2**63)], "--seed"),
        ([*FUSE, "--format", "onnx"], "safetensors"),
        ([*FUSE, "--allow-code", "nett.py"], "no such file to allow"),
        ([*FUSE, "--report", "xml=x"], "json=PATH or md=PATH"),
        ([*FUSE, "--report", "json=-", "--report", "md=-"], "only one report can go to stdout"),
        ([*FUSE, "--report", "json=fuse.yaml"], "cannot replace a file of the command"),
        ([*FUSE, "--report", "json=none/x.json"], "the folder 'none' does not exist"),
        ([*FUSE, "--report", "json=."], "is a folder"),
        (["verify", "model.pt", "model.pt"], "no fusecli manifest"),
        (["verify", "model.pt", "none"], "there is no such file"),
        (["rules", "conv_bm"], "did you mean 'conv_bn'?"),
        (["explain", "bn_axis"], "did you mean 'bn-axis'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_2_usage(cli, digits, words, said):
    ended = cli(*words)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err.replace("\n", " ")
    assert "Traceback" not in ended.err
    assert not FUSED.exists()


@pytest.mark.parametrize(
    ("change", "said", "fix"),
    [
        (("groups:", "grups:"), "fuse.yaml:7:1: key 'grups' is unknown", "did you mean 'groups'?"),
        (("stem.bn,", "stem.bm,"), "fuse.yaml:8:17: no module is named 'stem.bm'", "did you mean 'stem.bn'?"),
        (("net.py:build", "net.py:biuld"), "there is no 'biuld' in it", "did you mean 'build'?"),
        (('build"}', 'build", kwargs: {size: 3}}'), "raised TypeError", "check model.kwargs"),
        (("net.py:build", "net.py:torch"), "raised TypeError", "check model.kwargs"),
        (("model_state_dict", "state"), "no state dict under the key 'state'", "model_state_dict"),
        (("key: images", "key: imgs"), "has no tensor 'imgs'", "it has images"),
        (("heldout", "held"), "held.safetensors cannot be read", "relative to the spec"),
        (
            ("file: heldout.safetensors, key: images", "shape: [2, 3, 8, 8]"),
            "expected input",
            "one entry per",
        ),
        (
            ("file: heldout.safetensors, key: images", "shape: [2, 1, 8, 8], dtype: int64"),
            "needs a range",
            "add range",
        ),
        (
            ("inputs:\n  - {file: heldout.safetensors, key: images}", "# nothing:"),
            "there is a model, but no inputs",
            "add inputs",
        ),
    ],
)
def test_2_a_spec_that_does_not_fit(cli, digits, change, said, fix):
    edit(digits / "fuse.yaml", change)
    ended = cli(*FUSE)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert fix in ended.err
    assert "Traceback" not in ended.err
    assert not FUSED.exists()


def test_2_all_mistakes_at_once(cli, digits):
    edit(
        digits / "fuse.yaml",
        ("groups:", "grups:"),
        ("key: images", "kye: images"),
        ("version: 1", "version: 9"),
    )
    assert cli(*FUSE).err.count("error: fuse.yaml:") == 3


def test_2_a_checkpoint_of_another_model(cli, digits):
    torch.save({"model_state_dict": {"other.weight": torch.ones(3)}}, "model.pt")
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "the model needs" in ended.err
    assert "the file has other.weight, which the model has not" in ended.err


def test_2_a_factory_that_returns_no_module(cli, project):
    folder = project(PAIR + "\ndef number():\n    return 3\n")
    edit(folder / "fuse.yaml", ("net.py:build", "net.py:number"))
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "the factory net.py:number returned int, not an nn.Module" in ended.err


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_3_unreadable(cli, digits, content):
    Path("model.pt").write_bytes(content)
    ended = cli(*FUSE)
    assert (ended.code, ended.out) == (3, "")
    assert "error: model.pt: " in ended.err
    assert "fix: " in ended.err
    assert not FUSED.exists()


def test_4_refused(cli, digits):
    edit(digits / "fuse.yaml", ("[up.conv, up.bn, up.act]", "[pool, up.bn]"))
    ended = cli(*FUSE)
    assert ended.code == 4
    assert "no rule fuses AvgPool2d -> BatchNorm2d" in ended.out
    assert "remedy" in ended.out
    assert "fuse.yaml:11" in ended.out
    assert not FUSED.exists()


def test_4_a_pair_that_the_run_disproves(cli, digits):
    edit(digits / "fuse.yaml", ('["blocks.*.conv", "blocks.*.bn"]', "[blocks.0.conv, blocks.1.bn]"))
    ended = cli(*FUSE)
    assert ended.code == 4
    said = " ".join(ended.out.split())
    assert "blocks.1.bn reads what comes from aten.convolution in blocks.1.conv" in said
    assert "fuse.yaml:10" in said
    assert not FUSED.exists()


def test_5_nothing_to_fuse(cli, digits):
    assert cli(*FUSE).code == 0
    # The artifact has neither the nesting nor the norms that the spec speaks of.
    ended = cli("fuse", FUSED, "--spec", "fuse.yaml", "--allow-code", "net.py")
    assert ended.code == 5
    assert "is an artifact of fusecli: its 6 groups are folded already" in " ".join(ended.out.split())
    assert not Path("model.fused.fused.safetensors").exists()


def test_5_no_groups(cli, project):
    project(groups=None)
    ended = cli(*FUSE)
    assert ended.code == 5
    assert "the spec lists no groups" in ended.out
    assert "not-listed" in ended.out


NEVER_RUN = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.spare, self.spare_bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x))

build = Net
"""


def test_6_a_group_that_never_ran(cli, project):
    project(NEVER_RUN, groups=[["conv", "bn"], ["spare", "spare_bn"]])
    ended = cli(*FUSE)
    assert ended.code == 6
    assert "spare + spare_bn" in ended.out
    assert not FUSED.exists()


def test_6_strict_doubts_what_was_only_claimed(cli, project):
    project(model=None, inputs=None, assume={"eps": 1e-5})
    assert cli("fuse", "model.pt", "--spec", "fuse.yaml", "--dry-run").code == 0
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", "--strict")
    assert ended.code == 6
    assert "eps 1e-05, as the spec assumes" in " ".join(ended.out.split())
    assert not FUSED.exists()


def test_70_a_bug_is_said_to_be_one(cli, digits, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("fusecli.commands.fuse.fuse_file", broken)
    ended = cli(*FUSE, "--report", "json=-")
    assert ended.code == 70
    assert "internal error: ZeroDivisionError: ours" in ended.err
    assert "This is a bug in fusecli" in ended.err
    assert "Traceback" not in ended.err
    assert (ended.report["status"], ended.report["exit_code"]) == ("error", 70)
    assert "ZeroDivisionError: ours" in ended.report["problems"][0]
