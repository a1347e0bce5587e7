"""What a proof runs besides the recorded sample, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fusecli.errors import ExitCode
from fusecli.proof.streamed import ROOM, Kept
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


HALF = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x))

def build():
    return Net().to(torch.DTYPE)
"""
COMMANDS = {
    "fuse": ("fuse", "model.pt", "--force"),
    "plan": ("plan", "model.pt", "-o", "planned.yaml", "--force"),
    "verify": ("verify", "model.pt", "model.fused.safetensors"),
}


def half(project: Project, dtype: str, **keys: Any) -> None:
    project(HALF.replace("DTYPE", dtype), groups=[["conv", "bn"]], **keys)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_random_inputs_have_the_dtype_that_the_model_computes_in(
    project: Project, cli: Cli, dtype: str
) -> None:
    half(project, dtype)
    for words in COMMANDS.values():
        ended = cli(*words, "--spec", "fuse.yaml", *ALLOWED, "--report", "json=out.json")
        assert ended.code == ExitCode.OK, (words, ended.err, ended.out)
        ledger = json.loads(Path("out.json").read_text())["ledger"]
        (told,) = [entry["what"] for entry in ledger if entry["where"] == "inputs"]
        assert told.startswith(f"random inputs are {dtype}, as most of the model's parameters")
    assert "dtype" not in Path("planned.yaml").read_text()


def test_typed_inputs_too(project: Project, cli: Cli) -> None:
    half(project, "float16")
    model = ("--model", "net.py:build()", "--input", "2x3x8x8")
    ended = cli("fuse", "model.pt", "--discover", *model, "--report", "json=-", "-q")
    assert ended.code == ExitCode.OK, ended.err
    assert ended.report["ledger"][0]["what"].startswith("random inputs are float16")
    assert ended.report["ledger"][0]["kind"] != "input"  # that is a file that is another one
    assert cli("verify", "model.pt", "model.fused.safetensors", *model).code == ExitCode.OK
    assert cli("plan", "model.pt", *model).code == ExitCode.OK


def test_a_dtype_in_the_spec_wins(project: Project, cli: Cli) -> None:
    half(project, "bfloat16", inputs=[{"shape": [2, 3, 8, 8], "dtype": "float32"}])
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOWED, "--report", "json=-", "-q")
    assert ended.code == ExitCode.INCONCLUSIVE
    assert not [entry for entry in ended.report["ledger"] if entry["where"] == "inputs"]
    cli("plan", "model.pt", "--spec", "fuse.yaml", *ALLOWED, "-o", "planned.yaml")
    assert "dtype: float32" in Path("planned.yaml").read_text()


def test_float32_is_nothing_to_tell(project: Project, cli: Cli) -> None:
    project(groups=[["conv", "bn"]])
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOWED, "--report", "json=-", "-q")
    assert ended.code == ExitCode.OK
    assert [entry for entry in ended.report["ledger"] if entry["kind"] != "consent"] == []


MIXED = HALF.replace(
    "return Net().to(torch.DTYPE)", "net = Net()\n    net.bn.to(torch.float64)\n    return net"
)


def test_the_dtype_of_most_parameters(project: Project, cli: Cli) -> None:
    project(MIXED, groups=[["conv", "bn"]])
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOWED, "--report", "json=-", "-q")
    assert not [entry for entry in ended.report["ledger"] if entry["where"] == "inputs"]


PADS = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2, stride=2)

    def forward(self, x):
        y = self.norm(x)
        if y.shape[-1] % 2:
            y = F.pad(y, (0, 1))
        return self.conv(y)

def build():
    return Net()
"""


def pads(project: Project, dynamic: Any = None, *, discover: bool = False) -> None:
    entry = {"shape": [2, 3, 8, 8]} | ({} if dynamic is None else {"dynamic": dynamic})
    groups = None if discover else [["norm", "conv"]]
    project(PADS, groups=groups, inputs=[entry], discover=discover or None)


def test_a_listed_fold_that_holds_at_one_size_is_different(project: Project, cli: Cli) -> None:
    pads(project)
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOWED, "--report", "json=-", "-q")
    assert ended.code == ExitCode.DIFFERENT
    assert not Path("model.fused.safetensors").exists()
    (reason,) = ended.report["verification"]["reasons"]
    assert "right at 2x3x8x8, but at 2x3x8x9" in reason
    assert "dynamic: []" in reason


def test_a_discovered_one_is_left(project: Project, cli: Cli) -> None:
    pads(project, discover=True)
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOWED, "--report", "json=-", "-q")
    assert ended.code == ExitCode.NOTHING
    (norm,) = ended.report["unfused"]
    assert norm["code"] == "dropped"
    assert "2x3x8x9" in norm["reason"]


@pytest.mark.parametrize("dynamic", [[], [0], [0, 2]])
def test_sizes_that_the_spec_says_never_change_are_not_tried(
    project: Project, cli: Cli, dynamic: list[int]
) -> None:
    pads(project, dynamic)
    for words in (COMMANDS["fuse"], COMMANDS["verify"]):
        ended = cli(*words, "--spec", "fuse.yaml", *ALLOWED, "--report", "json=-", "-q")
        assert ended.code == ExitCode.OK, ended.err
        said = ended.report["verification"]["checks"]["sizes"]
        assert "x9," not in said + ","
        assert ("the spec says that sizes are fixed" in said) is (dynamic == [])
        assert ("3x3x" in said) is (0 in dynamic)


def test_an_axis_that_the_spec_names_is_tried(project: Project, cli: Cli) -> None:
    pads(project, [3])
    assert cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOWED).code == ExitCode.DIFFERENT


def test_verify_tries_other_sizes_too(project: Project, cli: Cli) -> None:
    pads(project, [])
    assert cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOWED).code == ExitCode.OK
    spec = json.loads(Path("fuse.yaml").read_text())
    spec["inputs"] = [{"shape": [2, 3, 8, 8]}]
    Path("any.yaml").write_text(json.dumps(spec))
    words = ("verify", "model.pt", "model.fused.safetensors", "--spec", "any.yaml", *ALLOWED)
    ended = cli(*words, "--report", "json=-", "-q")
    assert ended.code == ExitCode.DIFFERENT
    assert "2x3x8x9" in ended.report["verification"]["reasons"][0]


def test_every_report_says_for_which_sizes_the_verdict_speaks(project: Project, cli: Cli) -> None:
    project()
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOWED, "--report", "md=out.md")
    assert ended.code == ExitCode.OK
    told = "equal at 2x3x8x8, 3x3x9x8 and 2x3x8x9; inputs of another rank were not tried"
    assert told in " ".join(ended.out.split())
    assert told in Path("out.md").read_text().replace("\\", "")


def test_an_axis_that_a_file_has_not_got(project: Project, cli: Cli) -> None:
    save_file({"x": torch.randn(2, 3, 8, 8)}, "x.safetensors")
    project(inputs=[{"file": "x.safetensors", "key": "x", "dynamic": [4]}])
    save_file({"x": torch.randn(2, 3, 8, 8)}, "x.safetensors")
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOWED)
    assert ended.code == ExitCode.USAGE
    assert "x.safetensors:x has no axis 4" in ended.err


ASKS = """
import torch
from torch import nn

class Gate(nn.Module):
    def forward(self, x):
        if x.abs().sum().item() > 0:
            return x
        return x * 2

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.gate = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Gate()

    def forward(self, x):
        return self.gate(self.bn(self.conv(x)))

def build():
    return Net()
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_where_forward_asks_for_numbers_is_named(project: Project, cli: Cli, command: str) -> None:
    project(ASKS)
    if command == "verify":
        assert cli(*COMMANDS["fuse"], "--spec", "fuse.yaml", *ALLOWED).code == ExitCode.OK
    ended = cli(*COMMANDS[command], "--spec", "fuse.yaml", *ALLOWED, "--report", "json=out.json")
    assert ended.code == ExitCode.OK, ended.err
    ledger = json.loads(Path("out.json").read_text())["ledger"]
    asked = [entry["where"] for entry in ledger if entry["kind"] != "consent"]
    assert asked == ["gate (net.py:7 in Gate.forward)"]
    if command == "plan":
        assert "#   gate (net.py:7 in Gate.forward)" in Path("planned.yaml").read_text()


def test_quantize_gets_as_far_as_what_int8_is_made_of(project: Project, cli: Cli) -> None:
    half(project, "bfloat16")
    ended = cli("quantize", "model.pt", "--spec", "fuse.yaml", *ALLOWED, "--dry-run")
    assert ended.code == ExitCode.USAGE
    assert "its weight is bfloat16; only float32 is quantized" in ended.err


def test_a_plan_proposes_what_fuse_will_prove(project: Project, cli: Cli) -> None:
    pads(project)
    plan = ("plan", "model.pt", "--spec", "fuse.yaml", *ALLOWED, "-o", "planned.yaml", "--force")
    assert cli(*plan).code == ExitCode.NOTHING
    assert "but not at 2x3x8x9" in Path("planned.yaml").read_text()
    pads(project, [])
    assert cli(*plan).code == ExitCode.OK
    text = Path("planned.yaml").read_text()
    assert "dynamic: []" in text
    assert "[norm, conv]" in text
    assert cli("fuse", "model.pt", "--spec", "planned.yaml", *ALLOWED).code == ExitCode.OK


def test_memory_bounds_what_is_kept_and_the_peak_is_told(
    project: Project, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms = []

    class Noted(Kept):
        def __init__(self, room: int = ROOM) -> None:
            rooms.append(room)
            super().__init__(room)

    monkeypatch.setattr("fusecli.proof.prove.Kept", Noted)
    project(verify={"memory": "1MiB", "samples": 1})
    words = ("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOWED, "--report", "json=-", "--dry-run")
    for typed, room in (((), 2**20), (("--memory", "2GB"), 2 * 10**9), (("--memory", "0"), 0)):
        ended = cli(*words, *typed)
        assert (ended.code, rooms.pop(), rooms) == (ExitCode.OK, room, [])
        assert ended.report["peak_memory"] > 10**6
    ended = cli(*words, "--memory", "much")
    assert (ended.code, "512MB or 4GB" in ended.err) == (ExitCode.USAGE, True)
