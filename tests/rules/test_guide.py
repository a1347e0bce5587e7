"""The guide in fusecli/README.md is enough to add a rule: its example is one, and works."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusecli
from fusecli import rules
from fusecli.engine import planning
from fusecli.errors import ExitCode
from tests import nets
from tests.conftest import Cli
from tests.proof.nets import net
from tests.rules.wired import assert_rounded_once, classes, folded, refusal

README = Path(rules.__file__).parent.parent / "README.md"
X = nets.images(2, 3, 7, 6)
NET = """
from collections import OrderedDict
from torch import nn

def build():
    layers = OrderedDict(up=nn.ConvTranspose2d(3, 6, 3, stride=2), point=nn.Conv2d(6, 4, 1))
    return nn.Sequential(layers)
"""


def example() -> tuple[str, str]:
    """The name of the example's file, and what is in it."""
    guide = README.read_text(encoding="utf-8").partition("## To add ...")[2]
    name, source = re.findall(r"rules/(\w+)\.py`[^`]*?\n```python\n(.*?)```", guide, re.DOTALL)[0]
    return name, source


NAME, SOURCE = example()


def forget() -> None:
    rules.all_rules.cache_clear()
    planning._rule_for.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The folder of rules with one file more; without it afterwards."""
    folder = tmp_path / "rules"
    shutil.copytree(rules._FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / f"{NAME}.py").write_text(SOURCE, encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(rules, "_FOLDER", folder)
        patched.setattr(rules, "__path__", [*rules.__path__, str(folder)])
        forget()
        yield NAME
    rules._RULES.pop(NAME, None)
    sys.modules.pop(f"fusecli.rules.{NAME}", None)
    if hasattr(rules, NAME):
        delattr(rules, NAME)
    forget()


def decoder(bias: bool = True) -> Any:
    """A transposed convolution, and a pointwise one behind it."""
    return net(
        lambda m, x: torch.relu(m.point(m.up(x))),
        up=nn.ConvTranspose2d(3, 6, 3, stride=2, padding=1, bias=bias),
        point=nn.Conv2d(6, 4, 1, bias=False),
    )


def test_it_is_short_and_not_there_yet() -> None:
    assert len([line for line in SOURCE.splitlines() if line]) <= 25
    assert NAME not in rules.names()


def test_it_is_listed_and_explained(cli: Cli, added: str) -> None:
    listed = cli("rules")
    assert listed.code == 0
    assert re.search(rf"^\s*{added}\s+compose\b", listed.out, re.MULTILINE), listed.out
    page = cli("rules", added)
    assert (page.code, SOURCE.splitlines()[0].strip('"') in " ".join(page.out.split())) == (0, True)


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_folds_by_it_and_is_proven(added: str, bias: bool) -> None:
    model = decoder(bias)
    once = folded(model, X, added, "up point")
    assert classes(once, "up", "point") == ["ConvTranspose2d", "Identity"]
    assert tuple(once.up.weight.shape) == (3, 4, 3, 3)
    assert sum(p.numel() for p in once.parameters()) < sum(p.numel() for p in model.parameters())
    assert_rounded_once(model, X, torch.bfloat16)


def test_its_guard_refuses(added: str) -> None:
    grows = net(
        lambda m, x: torch.relu(m.point(m.up(x))), up=nn.ConvTranspose2d(3, 2, 3), point=nn.Conv2d(2, 9, 1)
    )
    assert refusal(grows, X, ["up", "point"]) == "grows"


def test_what_the_algebra_refuses_is_refused(added: str) -> None:
    model = net(
        lambda m, x: torch.relu(m.next(m.up(x))), up=nn.ConvTranspose2d(3, 3, 3), next=nn.Conv2d(3, 3, 3)
    )
    assert refusal(model, X, ["up", "next"]) == "not-pointwise"


def test_a_file_folded_by_it_is_verified(cli: Cli, added: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    names: dict[str, Any] = {}
    exec(NET, names)
    torch.save(nets.randomise(names["build"](), 0).state_dict(), tmp_path / "model.pt")
    words = ("--model", f"{tmp_path / 'net.py'}:build", "--input", "2x3x7x6")
    ended = cli("fuse", tmp_path / "model.pt", "--discover", *words, "--report", "json=-")
    assert (ended.code, [group["rule"] for group in ended.report["groups"]]) == (0, [added]), ended.err
    fused = tmp_path / "model.fused.safetensors"
    assert cli("verify", tmp_path / "model.pt", fused, *words).code == 0
    assert isinstance(fusecli.load_fused(names["build"](), fused).point, nn.Identity)


def test_afterwards_it_is_gone(cli: Cli) -> None:
    assert NAME not in cli("rules").out
    outcome = fusecli.fuse(decoder(), X, discover=True)
    assert (outcome.exit_code, outcome.groups) == (ExitCode.NOTHING, ())
    assert NAME not in {rule.name for rule in rules.all_rules()}
