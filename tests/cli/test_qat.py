"""QAT fusion on files: written, proven in train mode too, loaded again to be trained, and not mistaken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fusecli
from fusecli.errors import UsageError
from tests.cli.conftest import PAIR, Project
from tests.conftest import Cli

ALLOW = ["--allow-code", "net.py"]


def manifest(path: str) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fusecli"])


def fused_qat(project: Project, cli: Cli, **keys: Any) -> Path:
    folder = project(qat=True, inputs=[{"shape": [4, 3, 8, 8]}], **keys)
    assert cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOW, "--report", "json=r.json").code == 0
    return folder


def build() -> Any:
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(PAIR, "net.py", "exec"), names)
    return names["build"]()


def test_it_is_written_and_loads_to_be_trained(project: Project, cli: Cli) -> None:
    fused_qat(project, cli)
    assert manifest("model.fused.safetensors")["mode"] == "qat"
    stored, original = load_file("model.fused.safetensors"), torch.load("model.pt", weights_only=True)
    assert {key.replace("conv.0", "conv").replace("conv.1", "bn") for key in stored} == set(original)
    assert torch.equal(stored["conv.1.running_mean"], original["bn.running_mean"])
    model = fusecli.load_fused(build(), "model.fused.safetensors", mode="qat")
    assert (type(model.conv).__name__, model.training, model.conv[1].training) == ("ConvBn2d", True, True)


def test_the_report_says_that_it_trains_alike(project: Project, cli: Cli) -> None:
    fused_qat(project, cli)
    report = json.loads(Path("r.json").read_text())
    assert report["verification"]["check_results"]["training"] == "equivalent"
    assert "after an optimiser step too" in report["verification"]["checks"]["training"]
    assert report["groups"][0]["rule"] == "conv_bn_qat"
    done = cli("verify", "model.pt", "model.fused.safetensors", "--spec", "fuse.yaml", *ALLOW)
    assert (done.code, "training" in done.out) == (0, True)


def test_without_the_code_the_tensors_are_proven(project: Project, cli: Cli) -> None:
    project(qat=True, model=None, inputs=None, groups=[{"modules": ["conv", "bn"], "eps": 1e-5}])
    assert cli("fuse", "model.pt", "--spec", "fuse.yaml").code == 0
    assert manifest("model.fused.safetensors")["edits"][0]["cls"] == "ConvBn2d"
    assert cli("verify", "model.pt", "model.fused.safetensors").code == 0


def test_one_sample_is_too_few_to_train_on(project: Project, cli: Cli) -> None:
    source = PAIR.replace("nn.Conv2d(3, 6, 3)", "nn.Linear(3, 6)").replace("BatchNorm2d", "BatchNorm1d")
    project(source, qat=True, inputs=[{"shape": [1, 3]}])
    done = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOW)
    assert (done.code, "does not train on these inputs" in " ".join(done.out.split())) == (6, True)
    assert not Path("model.fused.safetensors").exists()


def test_case_46_a_folded_artifact_where_qat_is_expected(project: Project, cli: Cli) -> None:
    project()
    assert cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOW).code == 0
    spec = json.loads(Path("fuse.yaml").read_text())
    Path("qat.yaml").write_text(json.dumps({**spec, "qat": True}))
    said = "the artifact is folded, its norms are gone: it cannot be trained as QAT is"
    done = cli("verify", "model.pt", "model.fused.safetensors", "--spec", "qat.yaml", *ALLOW)
    assert (done.code, said in " ".join(done.err.split())) == (2, True)
    with pytest.raises(UsageError, match=said):
        fusecli.load_fused(build(), "model.fused.safetensors", mode="qat")
    assert manifest("model.fused.safetensors")["mode"] == "folded"


def test_case_46_the_other_way_round(project: Project, cli: Cli) -> None:
    fused_qat(project, cli)
    with pytest.raises(UsageError, match=r"is to be trained \(qat\), its norms are not folded"):
        fusecli.load_fused(build(), "model.fused.safetensors", mode="folded")


@pytest.mark.parametrize("other", [{"bake": True}, {"remove_idle": True}, {"shared": "clone"}])
def test_what_folds_cannot_go_with_qat(project: Project, cli: Cli, other: dict[str, Any]) -> None:
    project(qat=True, **other)
    done = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOW)
    assert (done.code, "cannot go with qat: true" in " ".join(done.err.split())) == (2, True)


def test_discovery_for_training(project: Project, cli: Cli) -> None:
    project(inputs=[{"shape": [4, 3, 8, 8]}], groups=[])
    words = ["--spec", "fuse.yaml", "--discover", "--qat", *ALLOW]
    assert cli("fuse", "model.pt", *words).code == 0
    assert manifest("model.fused.safetensors")["groups"][0]["rule"] == "conv_bn_qat"


def test_a_damaged_mode_is_no_manifest(project: Project, cli: Cli) -> None:
    fused_qat(project, cli)
    from safetensors.torch import save_file

    text = json.dumps({**manifest("model.fused.safetensors"), "mode": "other"})
    save_file(load_file("model.fused.safetensors"), "odd.safetensors", {"fusecli": text})
    assert cli("verify", "model.pt", "odd.safetensors", "--spec", "fuse.yaml", *ALLOW).code == 3


ERRATIC = """
import itertools
from torch import nn

counted = itertools.count(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
    def forward(self, x):
        y = self.bn(self.conv(x))
        return y * next(counted) if self.training else y

def build():
    return Net()
"""


def test_a_model_that_trains_differently_each_time(project: Project, cli: Cli) -> None:
    """It is no proof against the fusion, nor one for it."""
    project(ERRATIC, qat=True, inputs=[{"shape": [4, 3, 8, 8]}])
    done = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOW)
    assert (done.code, "the original itself, trained twice" in " ".join(done.out.split())) == (6, True)
