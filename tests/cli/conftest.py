"""Small projects to run the program in: a model's code, its checkpoint and its spec in one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nets import randomise

# Every fold of the digits network, in the order of its run.
PAIRS = [
    ["stem.conv", "stem.bn"],
    ["down.depthwise", "down.bn"],
    ["blocks.0.conv", "blocks.0.bn"],
    ["blocks.1.conv", "blocks.1.bn"],
    ["up.conv", "up.bn"],
    ["head.linear", "head.bn"],
]
PAIR = """
from collections import OrderedDict
from torch import nn

def build():
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6)))
"""
Project = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Makes net.py, model.pt and fuse.yaml in the working folder, and returns that folder."""
    monkeypatch.chdir(tmp_path)

    def make(
        source: str = PAIR,
        groups: Sequence[Any] = (("conv", "bn"),),
        inputs: Any = ({"shape": [2, 3, 8, 8]},),
        **keys: Any,
    ) -> Path:
        names: dict[str, Any] = {"__name__": "net"}
        exec(compile(source, "net.py", "exec"), names)
        torch.save(randomise(names["build"](), 0).state_dict(), "model.pt")
        Path("net.py").write_text(source)
        # A number such as 1e-05 is a number in JSON and YAML, so JSON will do.
        spec = {
            "version": 1,
            "model": {"factory": "net.py:build"},
            "inputs": inputs,
            "groups": groups,
            **keys,
        }
        spec = {"verify": {"samples": 1}, **spec}
        Path("fuse.yaml").write_text(
            json.dumps({key: value for key, value in spec.items() if value is not None})
        )
        return tmp_path

    return make


FORGETFUL = """
def forgetful(is_qat, layer, norm, activation):
    from torch.nn.utils.fusion import fuse_linear_bn_eval

    return fuse_linear_bn_eval(layer, norm)
"""
MAPPING = """
extra_mappings:
  - {sequence: [torch.nn.Linear, torch.nn.BatchNorm1d, torch.nn.ReLU], fuser: "net.py:forgetful"}
"""


def wrong_fold(digits: Path) -> None:
    """The digits with a custom fuser that drops the head's activation: no audit sees what a fuser does."""
    for name, more in (("net.py", FORGETFUL), ("fuse.yaml", MAPPING)):
        with (digits / name).open("a") as file:
            file.write(more)


def edit(path: Path, *changes: tuple[str, str]) -> None:
    """Replaces texts that occur exactly once."""
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


def spoil(name: str, value: float) -> None:
    """Puts one number into the checkpoint of the working folder."""
    content = torch.load("model.pt", weights_only=True)
    content.get("model_state_dict", content)[name].view(-1)[0] = value
    torch.save(content, "model.pt")
