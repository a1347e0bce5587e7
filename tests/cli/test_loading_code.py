"""Models that have a say in how they are loaded: extra state, load hooks, old names, lazy layers, and names
that look like a wrapper's prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fusecli
from tests.cli.conftest import PAIR, Project
from tests.conftest import Cli
from tests.nets import randomise

WORDS = ("--spec", "fuse.yaml", "--allow-code", "net.py")
NET = """
import torch
from torch import nn
{extra}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        {setup}
    def forward(self, x):
        x = self.bn(self.conv(x))
        return {result}

build = Net
"""
SCALED = """
class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = torch.ones(6)
    def get_extra_state(self):
        return {get}
    def set_extra_state(self, state):
        {put}
    def forward(self, x):
        return x * self.k[:, None, None]
"""


def net(setup: str, result: str, extra: str = "") -> str:
    return NET.format(setup=setup, result=result, extra=extra)


def scaled(get: str, put: str) -> str:
    return net("self.scaled = Scaled()", "self.scaled(x)", SCALED.format(get=get, put=put))


def built(source: str) -> nn.Module:
    names: dict[str, Any] = {"__name__": "net"}
    exec(source, names)
    model: nn.Module = names["build"]()
    return model


def edited(change: Any) -> None:
    state = torch.load("model.pt", weights_only=True)
    change(state)
    torch.save(state, "model.pt")


def same(source: str, artifact: str, like: str | None = None) -> None:
    """The fused model, and the one that users have after load_state_dict (in the class `like`)."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    original = built(like or source)
    original.load_state_dict(torch.load("model.pt", weights_only=True))
    with torch.no_grad():
        wanted = original.eval()(x)
        assert torch.allclose(fusecli.load_fused(built(source), artifact)(x), wanted, rtol=1e-3, atol=1e-4)


K = [0.5, -1.0, 2.0, 3.0, 0.0, 1.5]
# How it is read and written, what the file holds, and whether safetensors can.
STATES: dict[str, tuple[str, str, Any, bool]] = {
    "a tensor": ("self.k", "self.k = state", torch.tensor(K), True),
    "a tensor made of numbers": (
        "torch.tensor(self.k.tolist())",
        "self.k = torch.tensor(state.tolist())",
        torch.tensor(K),
        True,
    ),
    "a dict of numbers": (
        "{'k': self.k.tolist(), 'name': 'é', 'n': None}",
        "self.k = torch.tensor(state['k'])",
        {"k": K, "name": "é", "n": None},
        True,
    ),
    "a dict with a tensor": ("{'k': self.k}", "self.k = state['k']", {"k": torch.tensor(K)}, False),
    "a tuple": ("tuple(self.k.tolist())", "self.k = torch.tensor(state)", tuple(K), False),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("fmt", ["safetensors", "pt"])
def test_extra_state_is_carried(cli: Cli, project: Project, name: str, fmt: str) -> None:
    get, put, state, in_json = STATES[name]
    source, out = scaled(get, put), f"out.{fmt}"
    project(source)
    edited(lambda found: found.update({"scaled._extra_state": state}))
    ended = cli("fuse", "model.pt", *WORDS, "--format", fmt, "-o", out)
    if fmt == "safetensors" and not in_json:
        assert ended.code == 2
        said = " ".join(ended.err.split())
        assert "scaled._extra_state is no tensor" in said
        assert "--format pt" in said
        assert not Path(out).exists()
        return
    assert ended.code == 0, ended.out + ended.err
    same(source, out)
    assert cli("verify", "model.pt", out, *WORDS).code == 0
    assert cli("verify", "model.pt", out).code == 0


def test_extra_state_that_was_changed_is_no_fold(cli: Cli, project: Project) -> None:
    get, put, state, _ = STATES["a dict with a tensor"]
    project(scaled(get, put))
    edited(lambda found: found.update({"scaled._extra_state": state}))
    assert cli("fuse", "model.pt", *WORDS, "--format", "pt", "-o", "out.pt").code == 0
    edited(lambda found: found.update({"scaled._extra_state": {"k": torch.ones(6)}}))
    assert cli("verify", "model.pt", "out.pt", *WORDS).code == 1
    assert cli("verify", "model.pt", "out.pt").code == 1


def test_extra_state_of_a_norm_goes_with_it(cli: Cli, project: Project) -> None:
    extra = """
class Norm(nn.BatchNorm2d):
    def get_extra_state(self):
        return {"seen": 3}
    def set_extra_state(self, state):
        pass
"""
    source = net("self.bn = Norm(6)", "x", extra)
    project(source)
    ended = cli("fuse", "model.pt", *WORDS, "-o", "out.safetensors")
    assert ended.code in (0, 4), ended.out + ended.err
    if ended.code == 0:
        same(source, "out.safetensors")


def test_extra_state_in_memory() -> None:
    model = randomise(built(scaled(*STATES["a dict of numbers"][:2])), 0).eval()
    model.scaled.k = torch.tensor(K)
    outcome = fusecli.fuse(model, torch.randn(2, 3, 8, 8), groups=["conv", "bn"])
    assert outcome.status == "fused"
    assert torch.equal(outcome.model.scaled.k, torch.tensor(K))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_is_refused_with_what_to_do(cli: Cli, project: Project) -> None:
    source = net("self.head = nn.LazyLinear(3)", "self.head(x.mean((2, 3)))")
    plain = source.replace("LazyLinear(3)", "Linear(6, 3)")
    project(plain)
    assert cli("fuse", "model.pt", *WORDS, "-o", "out.safetensors").code == 0
    spec = Path("fuse.yaml").read_text()

    def other(name: str, text: str) -> tuple[str, ...]:
        # Under another name: Python reads a file once.
        Path(f"{name}.py").write_text(text)
        Path("fuse.yaml").write_text(spec.replace("net.py", f"{name}.py"))
        return ("--spec", "fuse.yaml", "--allow-code", f"{name}.py")

    lazy = other("lazy", source)
    for words in (("fuse", "model.pt", "-o", "new.safetensors"), ("verify", "model.pt", "out.safetensors")):
        ended = cli(*words, *lazy)
        assert ended.code == 2, ended.out + ended.err
        assert "head.bias, head.weight has no shape yet" in " ".join(ended.err.split())
    unshaped = built(source)
    with pytest.raises(fusecli.errors.UsageError, match="no shape yet"):
        fusecli.load_fused(unshaped, "out.safetensors")
    # The remedy.
    ran = source.replace(
        "build = Net", "def build():\n    net = Net()\n    net(torch.zeros(2, 3, 8, 8))\n    return net"
    )
    ended = cli("fuse", "model.pt", *other("ran", ran), "-o", "new.safetensors")
    assert ended.code == 0, ended.out + ended.err


READS = """
class Scaling(nn.Conv2d):
    _version = 2
    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if metadata.get('version', 1) < 2:
            state[prefix + 'weight'] = state[prefix + 'weight'] * 2.0
        assert float(state[prefix + 'weight'].abs().sum()) > 0
        super()._load_from_state_dict(state, prefix, metadata, *args)
"""


@pytest.mark.parametrize("version", [None, 1, 2])
@pytest.mark.parametrize("groups", [[["conv", "bn"]], [["c2", "bn2"], ["conv", "bn"]]])
def test_loading_code_that_reads_and_changes_numbers(
    cli: Cli, project: Project, version: int | None, groups: Any
) -> None:
    source = net(
        "self.c2, self.bn2 = Scaling(6, 6, 3), nn.BatchNorm2d(6)", "self.bn2(self.c2(x.relu()))", READS
    )
    project(source, groups)

    def change(state: Any) -> None:
        if version is None:
            del state._metadata
        else:
            state._metadata["c2"]["version"] = version

    edited(change)
    ended = cli("fuse", "model.pt", *WORDS, "-o", "out.safetensors")
    assert ended.code == 0, ended.out + ended.err
    same(source, "out.safetensors")
    ended = cli("verify", "model.pt", "out.safetensors", *WORDS)
    assert ended.code == 0, ended.out + ended.err


def test_loading_code_that_fails_is_told_as_it_is(cli: Cli, project: Project) -> None:
    project(net("pass", "x"))
    Path("net.py").write_text(
        net(
            "self.register_load_state_dict_pre_hook(fails)",
            "x",
            "def fails(*args):\n    raise KeyError('old format')\n",
        )
    )
    ended = cli("fuse", "model.pt", *WORDS)
    assert ended.code == 2, ended.out + ended.err
    assert "Net cannot load it: KeyError: 'old format'" in " ".join(ended.err.split())


OLD = "nn.utils.weight_norm(nn.Conv2d(6, 6, 3))"
NEW = "nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3))"


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("how", [{}, {"bake": True, "discover": True}])
def test_old_weight_norm_in_the_new_class(cli: Cli, project: Project, how: Any) -> None:
    old, new = (
        net(f"self.c2 = {made}; self.bn2 = nn.BatchNorm2d(6)", "self.bn2(self.c2(x.relu()))")
        for made in (OLD, NEW)
    )
    project(old, None if how else [["conv", "bn"]], **how)
    Path("net.py").write_text(new)
    ended = cli("fuse", "model.pt", *WORDS, "-o", "out.safetensors")
    assert ended.code == 0, ended.out + ended.err
    same(new, "out.safetensors", like=old)
    assert cli("verify", "model.pt", "out.safetensors", *WORDS).code == 0


@pytest.mark.parametrize("child", ["module", "_orig_mod", "_fsdp_wrapped_module"])
@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("tensors_only", [False, True])
def test_a_child_that_is_called_like_a_wrapper(
    cli: Cli, project: Project, child: str, wrapped: str, tensors_only: bool
) -> None:
    source = PAIR.replace("conv=nn", f"{child}=nn.Sequential(OrderedDict(conv=nn").replace(
        "BatchNorm2d(6)", "BatchNorm2d(6)))"
    )
    project(source, [[f"{child}.conv", f"{child}.bn"]])
    state = {f"{wrapped}{name}": t for name, t in torch.load("model.pt", weights_only=True).items()}
    if tensors_only:
        save_file(state, "model.safetensors")
    else:
        torch.save(state, "model.pt")
    file = "model.safetensors" if tensors_only else "model.pt"
    for words in (
        ("fuse", file, "-o", "out.safetensors"),
        ("verify", file, "out.safetensors"),
        ("plan", file),
    ):
        ended = cli(*words, *WORDS)
        assert ended.code == 0, ended.out + ended.err
    fused = fusecli.load_fused(built(source), "out.safetensors").get_submodule(child)
    assert isinstance(fused.bn, nn.Identity)


def test_a_child_deep_inside_that_is_called_like_a_wrapper(cli: Cli, project: Project) -> None:
    source = PAIR.replace(
        "conv=nn.Conv2d(3, 6, 3)", "a=nn.Sequential(OrderedDict(_orig_mod=nn.Conv2d(3, 6, 3)))"
    )
    project(source, [["a._orig_mod", "bn"]])
    assert cli("fuse", "model.pt", *WORDS, "-o", "out.safetensors").code == 0
    assert cli("verify", "model.pt", "out.safetensors", *WORDS).code == 0


def test_quantize_reads_the_same_names_as_fuse(cli: Cli, project: Project) -> None:
    pytest.importorskip("torchao")
    source = PAIR.replace("conv=nn", "module=nn.Sequential(OrderedDict(conv=nn").replace(
        "BatchNorm2d(6)", "BatchNorm2d(6)))"
    )
    project(source, [["module.conv", "module.bn"]])
    ended = cli("quantize", "model.pt", *WORDS, "-o", "out.pt2")
    assert ended.code in (0, 6), ended.out + ended.err
    assert "needs module" not in ended.err
    assert isinstance(torch.load("model.pt", weights_only=True)["module.bn.bias"], Tensor)
