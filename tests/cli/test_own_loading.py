"""Models whose classes load a state dict in their own way, and what is said where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusecli
from tests.nets import images
from tests.rules.side_by_side import relative_error

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.held = [self.head.weight]
        START

    LOADING

    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3)) @ self.held[0].t()

def build():
    return Net()
"""
OWN = {
    "(state_dict, strict)": """
    def load_state_dict(self, state_dict, strict=True):
        return super().load_state_dict(state_dict, strict)
""",
    "nothing is returned": """
    def load_state_dict(self, state_dict, strict=True):
        super().load_state_dict(state_dict, strict)
""",
    "with assign, nothing is returned": """
    def load_state_dict(self, state_dict, strict=True, assign=False):
        super().load_state_dict(state_dict, strict, assign)
""",
    "(state_dict)": """
    def load_state_dict(self, state_dict):
        return super().load_state_dict(state_dict)
""",
    "(*args, **kwargs)": """
    def load_state_dict(self, *args, **kwargs):
        return super().load_state_dict(*args, **kwargs)
""",
}
MODEL = ("--model", "net.py:build", "--input", "2x3x8x8")


def source(loading: str = "", start: str = "") -> str:
    return NET.replace("LOADING", loading.strip()).replace("START", start)


def built() -> nn.Module:
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(Path("net.py").read_text(), "net.py", "exec"), names)
    model: nn.Module = names["build"]()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loading", OWN.values(), ids=OWN)
def test_a_load_state_dict_that_takes_less_than_torchs(
    cli: Any, project: Any, loading: str, dtype: torch.dtype
) -> None:
    """The tensors have the dtype of the file, and what the model keeps of them has their numbers."""
    project(source(loading))
    state = torch.load("model.pt", weights_only=True)
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, "model.pt")
    ended = cli("fuse", "model.pt", "--discover", *MODEL)
    assert (ended.code, ended.err) == (0, "")
    assert cli("verify", "model.pt", "model.fused.safetensors", *MODEL).code == 0
    model, x = built().to(dtype), images(3, 3, 9, 7).to(dtype)
    model.load_state_dict(torch.load("model.pt", weights_only=True))
    fused = fusecli.load_fused(built(), "model.fused.safetensors")
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}
    with torch.no_grad():
        error = relative_error(fused(x), model.eval()(x).double())
    assert error < (1e-5 if dtype is torch.float32 else 5e-2)


def test_what_is_missing_is_named_where_load_state_dict_returns_nothing(cli: Any, project: Any) -> None:
    project(source(OWN["nothing is returned"]))
    state = torch.load("model.pt", weights_only=True)
    del state["head.bias"]
    torch.save(state, "model.pt")
    ended = cli("fuse", "model.pt", "--discover", *MODEL)
    assert ended.code == 2
    assert "head.bias" in ended.err


def test_a_loading_hook_that_needs_the_norm_is_blamed_itself(cli: Any, project: Any) -> None:
    hook = "self.register_load_state_dict_post_hook(lambda m, _: setattr(m, 'gain', m.bn.weight.sum()))"
    project(source(start=hook))
    ended = cli("fuse", "model.pt", "--discover", *MODEL)
    assert ended.code != 0
    assert "'Identity' object has no attribute 'weight'" in ended.err
    assert "error: model.fused.safetensors: Net cannot load it" in ended.err
    assert "load_state_dict ends so too" not in ended.err
    assert not Path("model.fused.safetensors").exists()


def test_a_prefix_that_only_the_file_has_is_named_with_its_remedy(cli: Any, project: Any) -> None:
    root = project(source())
    state = torch.load("model.pt", weights_only=True)
    torch.save({"state_dict": {f"net.{name}": value for name, value in state.items()}}, "model.pt")
    ended = cli("fuse", "model.pt", "--discover", *MODEL)
    assert ended.code == 2
    assert "the file's names begin with 'net.'" in ended.err
    assert "strip_prefix: ['net.']" in ended.err
    spec = (root / "fuse.yaml").read_text()
    (root / "fuse.yaml").write_text(spec[:-1] + ', "checkpoint": {"strip_prefix": [\'net.\']}}')
    assert cli("fuse", "model.pt", "--spec", "fuse.yaml", "--allow-code", "net.py").code == 0


def test_tensors_in_containers_are_part_of_the_model(cli: Any, project: Any) -> None:
    scaled = source(start="self.scales = {'a': [torch.ones(4)]}")
    project(scaled.replace("].t()", "].t() * self.scales['a'][0]"))
    ended = cli("fuse", "model.pt", "--discover", *MODEL)
    assert ended.code == 0, ended.err
