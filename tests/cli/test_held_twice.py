"""Models that keep their tensors in a second place: what is proven, and what `load_fused` gives, is the model
that its users have after `load_state_dict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from tests.cli.conftest import Project
from tests.conftest import Cli, Run

FUSED = Path("out.safetensors")
WORDS = ("--spec", "fuse.yaml", "--allow-code", "net.py", "--report", "json=-")
FUSE = ("fuse", "model.pt", *WORDS, "-o", FUSED)
VERIFY = ("verify", "model.pt", FUSED, *WORDS)
# The values of construction are the same in every build: no run shows that they are not the file's.
NET = """
import torch
from torch import nn
from torch.nn import functional as F

{extra}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.h, self.bn2 = nn.Linear(6, 6), nn.BatchNorm1d(6)
        for p in self.parameters():
            nn.init.constant_(p, 0.25)
        with torch.no_grad():
            self.h.weight.add_(torch.eye(6))
        {setup}
    def forward(self, x):
        x = self.bn(self.conv(x)).relu().mean((2, 3))
        return {result}

build = Net
"""


def net(setup: str, result: str, extra: str = "") -> str:
    return NET.format(setup=setup, result=result, extra=extra)


TWICE = "self.bn2(self.h(x)) + "
# What the model keeps of the linear layer's tensors, and how its forward reads it.
HELD = {
    "a list": ("self.ws = [self.h.weight]", "F.linear(x, self.ws[0], self.h.bias)"),
    "a dict of buffers": ("self.d = {'v': self.bn2.running_var}", "self.h(x) * self.d['v']"),
    "a tuple in a list": ("self.ws = [(self.h.weight, 1)]", "F.linear(x, self.ws[0][0])"),
    "a view": ("self.wt = self.h.weight.t()", "x @ self.wt"),
    "a detached view": ("self.wt = self.h.weight.detach().t()", "x @ self.wt"),
    "a row": ("self.row = self.h.weight.data[1]", "x * self.row"),
    "a closure": (
        "w = self.h.weight; self.f = lambda x: F.linear(x, w)",
        "self.f(x)",
    ),
    "a closure over a view": ("w = self.h.weight.data.t(); self.f = lambda x: x @ w", "self.f(x)"),
    "a buffer that is a view": (
        "self.register_buffer('wt', self.h.weight.detach().t(), persistent=False)",
        "x @ self.wt",
    ),
    "an object": (
        "self.o = type('Holder', (), {})(); self.o.w = self.h.weight",
        "F.linear(x, self.o.w)",
    ),
    "a global of the file": ("CACHE['w'] = self.h.weight.data.t()", "x @ CACHE['w']"),
    "an array": ("self.a = self.h.weight.detach().numpy()", "x @ torch.from_numpy(self.a).to(x)"),
    "the other module's list": (
        "self.bn2.ws = [self.h.weight, self.h.bias]",
        "F.linear(x, *self.bn2.ws)",
    ),
}


def case(name: str, before: str = "") -> str:
    setup, result = HELD[name]
    return net(setup, before + result, "CACHE = {}")


def built(source: str) -> nn.Module:
    names: dict[str, Any] = {"__name__": "net"}
    exec(source, names)
    model: nn.Module = names["build"]()
    return model


def as_users_load_it(source: str) -> nn.Module:
    model = built(source)
    model.load_state_dict(torch.load("model.pt", weights_only=True))
    return model.eval()


def off(source: str, **how: Any) -> float:
    """How far the fused model is from the one that users have."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = as_users_load_it(source)(x)
        found = fusecli.load_fused(built(source), FUSED)(x.to(how.get("dtype", x.dtype))).float()
    return float((wanted - found).abs().max() / wanted.abs().max())


def in_half(dtype: torch.dtype = torch.bfloat16) -> None:
    state = torch.load("model.pt", weights_only=True)
    torch.save({n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}, "model.pt")


@pytest.mark.parametrize("name", HELD)
def test_a_second_place_has_the_files_numbers(cli: Cli, project: Project, name: str) -> None:
    source = case(name)
    project(source, [["conv", "bn"]])
    ended: Run = cli(*FUSE)
    assert ended.code == 0, ended.out + ended.err
    assert off(source) < 1e-4
    assert cli(*VERIFY).code == 0


@pytest.mark.parametrize("name", HELD)
def test_a_layer_that_is_read_twice_is_never_folded_wrong(cli: Cli, project: Project, name: str) -> None:
    source = case(name, TWICE)
    project(source, [["conv", "bn"], ["h", "bn2"]])
    ended = cli(*FUSE)
    assert ended.code in (1, 4), ended.out + ended.err
    assert not FUSED.exists()


# What a file in another dtype is loaded as: the dtype of the file, also where the model keeps a tensor twice.
FOLLOWED = [name for name in HELD if name != "an array"]


@pytest.mark.parametrize("name", FOLLOWED)
def test_the_dtype_of_the_file_is_kept(cli: Cli, project: Project, name: str) -> None:
    source = case(name)
    project(source, [["conv", "bn"]], [{"shape": [2, 3, 8, 8], "dtype": "bfloat16"}])
    in_half()
    ended = cli(*FUSE)
    assert ended.code == 0, ended.out + ended.err
    assert {p.dtype for p in fusecli.load_fused(built(source), FUSED).parameters()} == {torch.bfloat16}
    assert off(source, dtype=torch.bfloat16) < 0.05


def test_memory_that_cannot_change_its_dtype_is_refused(cli: Cli, project: Project) -> None:
    project(case("an array"), [["conv", "bn"]], [{"shape": [2, 3, 8, 8], "dtype": "float64"}])
    in_half(torch.float64)
    ended = cli(*FUSE)
    assert ended.code == 2, ended.out + ended.err
    said = " ".join(ended.err.split())
    assert "h.weight is loaded as torch.float64, and the model keeps it elsewhere too" in said
    assert "let the factory return the model in torch.float64" in said
    assert not FUSED.exists()


def test_a_model_without_numbers_that_keeps_a_tensor_twice_is_refused(cli: Cli, project: Project) -> None:
    source = case("a list")
    project(source, [["conv", "bn"]])
    assert cli(*FUSE).code == 0
    with torch.device("meta"):
        model = built(source)
    with pytest.raises(fusecli.errors.UsageError, match=r"h.weight is on meta, and the model keeps it in ws"):
        fusecli.load_fused(model, FUSED)


def test_a_model_without_numbers_that_keeps_nothing_twice_is_loaded(cli: Cli, project: Project) -> None:
    source = net("self.rnn = nn.LSTM(6, 6)", "self.rnn(self.h(x))[0]")
    project(source, [["conv", "bn"]])
    assert cli(*FUSE).code == 0
    with torch.device("meta"):
        model = built(source)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        wanted = as_users_load_it(source)(x)
        assert torch.allclose(fusecli.load_fused(model, FUSED)(x), wanted, rtol=1e-3, atol=1e-4)


TIED = [
    ("self.tail = nn.Linear(6, 6); self.tail.weight = self.h.weight", "tail.weight"),
    ("self.register_buffer('wt', self.h.weight.detach().t())", "wt"),
]


@pytest.mark.parametrize(("setup", "key"), TIED)
def test_tensors_that_are_one_in_the_model_and_two_in_the_file(
    cli: Cli, project: Project, setup: str, key: str
) -> None:
    source = net(setup, "self.h(x) + " + ("self.tail(x)" if "tail" in key else "x @ self.wt"))
    project(source, [["conv", "bn"]])
    state = torch.load("model.pt", weights_only=True)
    state[key] = torch.randn(6, 6)
    torch.save(state, "model.pt")
    ended = cli(*FUSE)
    if ended.code == 0:
        assert off(source) < 1e-4
    else:
        assert ended.code == 1, ended.out + ended.err


def test_what_a_caller_has_kept_of_a_model_follows_too(cli: Cli, project: Project) -> None:
    source = net("pass", "self.h(x)")
    project(source, [["conv", "bn"]])
    assert cli(*FUSE).code == 0
    model = built(source)
    seen, weight = model.state_dict(), model.h.weight
    fusecli.load_fused(model, FUSED)
    assert model.h.weight is weight
    assert torch.equal(seen["h.weight"], torch.load("model.pt", weights_only=True)["h.weight"])


class Remembers(nn.Module):
    """Reads a buffer through a view that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.k = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("state", torch.zeros(1, 6))
        self.view = self.state[0]

    def forward(self, x: Tensor) -> Tensor:
        self.state.copy_(self.h(x).mean(0, keepdim=True))
        out: Tensor = self.k(x) + self.view
        return out


def test_views_are_views_in_the_proof_too() -> None:
    original, other = Remembers().eval(), Remembers().eval()
    other.load_state_dict(original.state_dict())
    x = torch.randn(4, 6)
    assert fusecli.verify(original, other, x).equivalent
    with torch.no_grad():
        other.h.weight.mul_(1.5)
    assert not fusecli.verify(original, other, x).equivalent


def test_a_list_of_views_is_copied_with_its_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).eval()
    model.ws = [model[0].weight.transpose(0, 1)]
    x = torch.randn(2, 3, 8, 8)
    outcome = fusecli.fuse(model, x, groups=["0", "1"])
    assert outcome.status == "fused"
    assert torch.allclose(outcome.model(x), model(x), atol=1e-5)


VIEWING = """
class Viewing(nn.Linear):
    def __init__(self, i, o):
        super().__init__(i, o)
        {setup}

    def forward(self, x):
        return {result}
"""


@pytest.mark.parametrize(
    ("setup", "result"),
    [
        ("self.register_buffer('wt', self.weight.detach().t(), persistent=False)", "x @ self.wt + self.bias"),
        ("self.wt = self.weight.t()", "x @ self.wt + self.bias"),
        ("self.ws = [self.weight]", "F.linear(x, self.ws[0], self.bias)"),
        ("self.ws = [self.weight.data]", "F.linear(x, self.ws[0], self.bias)"),
    ],
)
@pytest.mark.parametrize("numbers", ["pass", "float(self.h.weight.data.sum())"])
def test_a_layer_that_keeps_its_own_weight_twice(
    cli: Cli, project: Project, setup: str, result: str, numbers: str
) -> None:
    made = f"self.h = Viewing(6, 6); {numbers}"
    source = net(made, "self.bn2(self.h(x))", VIEWING.format(setup=setup, result=result))
    project(source, [["conv", "bn"], ["h", "bn2"]])
    ended = cli(*FUSE)
    assert ended.code in (0, 1, 4), ended.out + ended.err
    assert FUSED.exists() == (ended.code == 0)
    if ended.code == 0:
        assert off(source) < 1e-4
    project(source, [["conv", "bn"]])
    ended = cli(*FUSE, "--force")
    assert ended.code == 0, ended.out + ended.err
    assert off(source) < 1e-4
