"""What a proof runs besides the recorded sample, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusecli.errors import ExitCode
from tests.cli.conftest import Project
from tests.conftest import Cli

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
ALLOWED = ("--allow-code", "net.py")
TAGGER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 5)
        self.out, self.bn = nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x, mask=None):
        y = self.head(self.encoder(x, src_key_padding_mask=mask)).relu()
        return self.bn(self.out(y.mean(1)))

def build():
    return Net()
"""


def test_an_encoder_that_pads(project: Project, cli: Cli) -> None:
    inputs = [{"shape": [2, 4, 8]}, {"shape": [2, 4], "dtype": "bool"}]
    project(TAGGER, groups=None, discover=True, inputs=inputs[:1])
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOWED, "--report", "json=-", "-q")
    assert ended.code == ExitCode.OK, ended.err
    assert [group["modules"] for group in ended.report["groups"]] == [["out", "bn"]]
    spec = json.loads(Path("fuse.yaml").read_text())
    spec["inputs"] = inputs
    Path("masked.yaml").write_text(json.dumps(spec))
    words = ("model.pt", "model.fused.safetensors", "--spec", "masked.yaml", *ALLOWED)
    assert cli("verify", *words).code == ExitCode.OK
