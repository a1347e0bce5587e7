"""The script that trains the digits network with simulated int8, run as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fusecli
from configs.digits.net import build
from fusecli.qat import FakeQuantize, QatConvBnReLU2d, disable_fake_quant, disable_observer, prepare_qat

pytest.importorskip("sklearn")

SCRIPT = Path(__file__).parent.parent / "scripts" / "qat_digits"


def test_it_trains_and_writes_a_state_dict_that_gives_what_was_printed(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    stages = re.findall(r"^(.+?) +([\d.]+)% of 120 held-out images right$", run.stdout, flags=re.MULTILINE)
    names = ["float", "simulated int8", "simulated int8, trained", "folded", "int8"]
    assert [stage for stage, _ in stages] == names
    # At most one image of 120 less than the float model: that is less than a point.
    assert all(float(right) > float(stages[0][1]) - 1 for _, right in stages)
    assert run.stderr == ""

    groups = [
        ["stem.conv", "stem.bn", "stem.relu"],
        ["down.depthwise", "down.bn"],
        ["head.linear", "head.bn"],
    ]
    groups += [[f"blocks.{number}.conv", f"blocks.{number}.bn"] for number in (0, 1)]
    model = prepare_qat(fusecli.fuse_modules_qat(build().train(), groups))
    model.load_state_dict(torch.load(tmp_path / "qat.pt", weights_only=True)["model_state_dict"], strict=True)
    assert isinstance(model.get_submodule("stem.conv"), QatConvBnReLU2d)
    ranges = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    assert len(ranges) == 12
    assert all(each.activation_post_process.observed and not each.observer_enabled for each in ranges)

    images, labels = held_out()
    scales = load_file(tmp_path / "folded.safetensors")
    assert scales["stem.conv.weight.scale"].shape == (32,)
    model.eval().apply(disable_observer)
    rounded = model(images)
    assert (rounded.argmax(1) == labels).float().mean().item() == pytest.approx(
        float(stages[2][1]) / 100, abs=1e-3
    )
    model.apply(disable_fake_quant)
    assert not torch.equal(model(images), rounded)


def held_out() -> tuple[torch.Tensor, torch.Tensor]:
    stored = load_file(SCRIPT.parent.parent / "configs" / "digits" / "heldout.safetensors")
    return stored["images"], stored["labels"]
