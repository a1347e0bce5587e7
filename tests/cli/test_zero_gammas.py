"""Residual networks that start with a gamma of 0, and pruned ones: their folds are as provable as any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fusecli
from fusecli.errors import ExitCode
from tests.nets import images

FUSE = ("fuse", "model.pt", "--spec", "fuse.yaml", "--allow-code", "net.py", "-o", "out.safetensors")
VERIFY = ("verify", "model.pt", "out.safetensors", "--spec", "fuse.yaml", "--allow-code", "net.py")
RESNET = """
from torch import nn

class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.down = None
        if stride > 1:
            self.down = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.down is None else self.down(x)))

class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.layers(self.relu(self.bn1(self.conv1(x)))).mean((2, 3)))

build = ResNet
"""
# What is 0: names that end so, and which of their entries.
ZEROS: dict[str, tuple[str, Any]] = {
    "last_gammas": ("bn2.weight", ...),
    "last_norms": ("bn2.", ...),
    "first_gammas": ("bn1.weight", ...),
    "pruned_branches": ("bn1.", ...),
    "pruned_channels": ("bn1.", slice(0, 3)),
    "kernels": ("conv2.weight", ...),
}


def zeroed(case: str) -> dict[str, Tensor]:
    """The checkpoint of the working folder with these zeros."""
    name, where = ZEROS[case]
    state: dict[str, Tensor] = torch.load("model.pt", weights_only=True)
    for key, tensor in state.items():
        if key.startswith("layers.") and name in key and key.endswith(("weight", "bias")):
            tensor[where] = 0.0
    torch.save(state, "model.pt")
    return state


@pytest.mark.parametrize("case", ZEROS)
def test_case_62_a_residual_network_with_zeros_is_fused_and_proven(cli, project, case):
    project(RESNET, groups=None, discover=True, inputs=[{"shape": [2, 3, 16, 16]}])
    state = zeroed(case)
    ended = cli(*FUSE, "--report", "json=-")
    assert ended.code == 0, ended.report["verification"]["reasons"]
    assert len(ended.report["groups"]) == 8
    assert cli(*VERIFY).code == 0

    names: dict[str, Any] = {"__name__": "net"}
    exec(RESNET, names)
    model = names["build"]()
    model.load_state_dict(state)
    outcome = fusecli.fuse(model.eval(), images(2, 3, 16, 16), discover=True)
    assert outcome.exit_code is ExitCode.OK, outcome.verification and outcome.verification.reasons
    assert all(group.status == "equivalent" for group in outcome.groups)


@pytest.mark.parametrize("case", ["last_gammas", "pruned_branches", "kernels"])
@pytest.mark.parametrize("key", ["layers.1.conv2.weight", "layers.1.conv2.bias", "layers.1.down.0.bias"])
def test_case_62_a_wrong_number_beside_the_zeros_is_refused(cli, project, case, key):
    project(RESNET, groups=None, discover=True, inputs=[{"shape": [2, 3, 16, 16]}])
    zeroed(case)
    assert cli(*FUSE).code == 0
    with safe_open("out.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file("out.safetensors")
    tensors[key].view(-1)[0] += 0.25
    save_file(tensors, "out.safetensors", metadata)
    ended = cli(*VERIFY)
    assert ended.code == 1
    assert key in ended.out


def test_case_62_statistics_of_another_checkpoint_are_refused(cli, project):
    """The gammas are 0 in both; what the fold reads elsewhere is not."""
    project(RESNET, groups=None, discover=True, inputs=[{"shape": [2, 3, 16, 16]}])
    zeroed("last_gammas")
    assert cli(*FUSE).code == 0
    state = torch.load("model.pt", weights_only=True)
    state["layers.0.bn1.running_var"] += 0.5
    torch.save(state, "model.pt")
    assert cli(*VERIFY).code == 1
    assert Path("out.safetensors").exists()
