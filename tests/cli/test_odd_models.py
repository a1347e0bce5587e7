"""Models that are legal and odd: each was once refused, misjudged, or ended as a bug."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fusecli
from fusecli.outcome import Judgement
from tests.cli.conftest import PAIR

FUSE = ("fuse", "model.pt", "--spec", "fuse.yaml", "--allow-code", "net.py", "-o", "out.safetensors")
VERIFY = ("verify", "model.pt", "out.safetensors", "--spec", "fuse.yaml", "--allow-code", "net.py")
NET = """
import sys
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        {setup}
    def forward(self, x):
        {before}
        return {result}
{extra}
build = Net
"""


def net(
    setup: str = "pass", before: str = "pass", result: str = "self.bn(self.conv(x))", extra: str = ""
) -> str:
    return NET.format(setup=setup, before=before, result=result, extra=extra)


@pytest.mark.parametrize("code", [0, 3])
def test_sys_exit_in_the_models_code_is_no_exit_code_of_ours(cli, project, code):
    project(net(before=f"sys.exit({code})"))
    ended = cli(*FUSE, "--report", "json=report.json")
    assert ended.code == 2
    assert f"sys.exit({code})" in ended.err
    assert Path("report.json").is_file()
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize("command", [FUSE, VERIFY])
def test_a_report_never_replaces_the_models_code(cli, project, command):
    project()
    assert cli(*FUSE).code == 0
    source = Path("net.py").read_text()
    ended = cli(*command, *(["--force"] if command is FUSE else []), "--report", "md=net.py")
    assert ended.code == 2
    assert Path("net.py").read_text() == source


def test_an_artifact_made_without_the_code_is_verified_with_it(cli, project):
    source = PAIR.replace("bn=nn.BatchNorm2d(6)", "bn=nn.BatchNorm2d(6), relu=nn.ReLU()")
    groups = [["conv", "bn", "relu"]]
    project(source, groups, inputs=None, model=None, assume={"eps": 1e-5})
    assert cli(*FUSE).code == 0
    project(source, groups)
    ended = cli(*VERIFY)
    assert ended.code == 0, ended.out
    names: dict = {}
    exec(source, names)
    original = names["build"]()
    original.load_state_dict(torch.load("model.pt", weights_only=True))
    fused = fusecli.load_fused(names["build"](), "out.safetensors")
    assert fusecli.verify(original, fused, torch.randn(2, 3, 8, 8)).judgement is Judgement.EQUIVALENT


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_norm_beside_the_group_stays(cli, project):
    project(
        net(
            setup="self.c2 = nn.utils.weight_norm(nn.Conv2d(6, 6, 3))",
            result="self.c2(self.bn(self.conv(x)))",
        )
    )
    assert cli(*FUSE).code == 0
    assert cli(*VERIFY).code == 0


def test_an_activation_kept_on_the_model_is_no_obstacle():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    model.register_forward_hook(lambda module, _, output: setattr(module, "seen", output))
    x = torch.randn(2, 3, 8, 8)
    model(x)
    assert fusecli.fuse(model, x, groups=["0", "1"]).status == "fused"


def test_a_train_that_returns_nothing(cli, project):
    project(net(extra="    def train(self, mode=True):\n        super().train(mode)\n"))
    assert cli(*FUSE).code == 0


def test_a_submodule_called_module_keeps_its_name(cli, project):
    source = PAIR.replace("conv=nn", "module=nn.Sequential(OrderedDict(conv=nn").replace(
        "BatchNorm2d(6)", "BatchNorm2d(6)))"
    )
    project(source, [["module.conv", "module.bn"]])
    assert cli(*FUSE).code == 0
    assert cli(*VERIFY).code == 0
    assert set(load_file("out.safetensors")) == {"module.conv.weight", "module.conv.bias"}


def test_loading_twice_into_one_model(cli, project):
    project()
    assert cli(*FUSE).code == 0
    names: dict = {}
    exec(PAIR, names)
    original, fused = names["build"](), names["build"]()
    original.load_state_dict(torch.load("model.pt", weights_only=True))
    for _ in range(2):
        fusecli.load_fused(fused, "out.safetensors")
    assert fusecli.verify(original, fused, torch.randn(2, 3, 8, 8)).equivalent


def test_a_model_that_its_checkpoint_does_not_determine_is_inconclusive(cli, project):
    project(net(setup="import torch; self.k = torch.rand(6, 1, 1)", result="self.bn(self.conv(x)) * self.k"))
    ended = cli(*FUSE)
    assert ended.code == 6, ended.out
    assert "two builds of the factory" in " ".join(ended.out.split())
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    ("setup", "result"),
    [
        ("self.layers = [self.conv, self.bn]", "self.layers[1](self.layers[0](x))"),
        ("self.layers = {1: self.conv, 2: (self.bn,)}", "self.layers[2][0](self.layers[1](x))"),
        ("conv, bn = self.conv, self.bn; self.layers = lambda x: bn(conv(x))", "self.layers(x)"),
    ],
)
@pytest.mark.parametrize("discovered", [False, True])
def test_case_61_layers_that_forward_reaches_another_way_are_named(cli, project, setup, result, discovered):
    project(net(setup=setup, result=result), **({"groups": None, "discover": True} if discovered else {}))
    ended = cli(*FUSE, "--report", "json=-")
    assert (ended.code, Path("out.safetensors").exists()) == (5 if discovered else 4, False)
    (no,) = ended.report["unfused" if discovered else "refused"]
    who = "bn" if discovered else "conv"
    assert (no["code"], no["reason"]) == (
        "held-elsewhere",
        f"forward reaches {who} through `layers`, not by its attribute",
    )


def test_case_61_a_list_of_layers_for_bookkeeping_hinders_no_file(cli, project):
    project(net(setup="self.layers = [self.conv, self.bn]; self.decayed = [self.conv.weight]"))
    assert (cli(*FUSE).code, cli(*VERIFY).code) == (0, 0)


SPEECH = """
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.rnn = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x):
        y = self.bn(self.conv(x)).transpose(1, 2)
        packed = pack_padded_sequence(y, [7, 5], batch_first=True)
        return {result}

build = Speech
"""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "result",
    [
        "pad_packed_sequence(self.rnn(packed)[0], batch_first=True)",
        "self.rnn(packed)",
        "torch.nested.nested_tensor([y[0], y[1, :5]]), self.rnn(packed)[0]",
    ],
)
def test_a_model_that_packs_its_sequences_is_fused(cli, project, result):
    project(SPEECH.format(result=result), inputs=[{"shape": [2, 4, 7]}])
    ended = cli(*FUSE)
    assert ended.code == 0, ended.err
    assert cli(*VERIFY).code == 0
