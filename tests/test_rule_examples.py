"""Every rule has an example under configs/rules, and each runs as its command stands in the repository."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from fusecli import load_fused, rules
from fusecli.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
EXAMPLES = [*(f"rules/{name}" for name in rules.names()), "mappings/custom_fuser", "bare/state_dict"]


def fuse(example: str, folder: Path) -> dict[str, Any]:
    """The JSON report of the example's command, which has to exit 0."""
    words = ["fuse", f"configs/{example}.safetensors", "--spec", f"configs/{example}.yaml"]
    report = folder / "report.json"
    outputs = ["-o", str(folder / "fused.safetensors"), "--report", f"json={report}"]
    result = CliRunner().invoke(app, [*words, *outputs], catch_exceptions=False)
    assert result.exit_code == 0, f"fusecli {' '.join(words)}\n{result.output}"
    found: dict[str, Any] = json.loads(report.read_text())
    return found


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pyproject.toml allows the code of the examples, and nothing else does."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("FUSECLI_ALLOW_CODE", raising=False)


def test_every_rule_has_an_example_and_every_example_a_rule() -> None:
    for suffix in ("yaml", "safetensors"):
        assert sorted(path.stem for path in (CONFIGS / "rules").glob(f"*.{suffix}")) == rules.names()


@pytest.mark.parametrize("example", EXAMPLES)
def test_it_fuses_and_is_proven(example: str, tmp_path: Path) -> None:
    report = fuse(example, tmp_path)
    assert report["status"] == "fused"
    assert report["groups"]
    assert all(group["float64_error"] < 1e-9 for group in report["groups"])
    assert (tmp_path / "fused.safetensors").exists()
    if example.startswith("rules/"):
        # A block of RepVGG takes three rules, a baked layer is folded; all other examples show theirs alone.
        used = {rule for group in report["groups"] for rule in group["rule"].split("+")}
        together = {"rules/parallel_norm": {"conv_bn", "parallel_layers"}, "rules/bake": {"conv_bn"}}
        others = together.get(example, set())
        assert used == {example.removeprefix("rules/"), *others}
        assert {group["evidence"] for group in report["groups"]} == {"observed"}


# An adapter makes another function of the class than the checkpoint alone is.
@pytest.mark.parametrize("rule", [rule for rule in rules.names() if rule != "lora"])
def test_the_file_loads_into_the_class_again(rule: str, tmp_path: Path) -> None:
    """Strictly, and what is loaded is the same function, on inputs of its own."""
    fuse(f"rules/{rule}", tmp_path)
    spec = yaml.safe_load((CONFIGS / "rules" / f"{rule}.yaml").read_text())
    build = runpy.run_path(str(CONFIGS / "rules" / "nets.py"))[rule]
    original, fresh = build().eval(), build().eval()
    original.load_state_dict(load_file(CONFIGS / "rules" / f"{rule}.safetensors"))
    loaded = load_fused(fresh, tmp_path / "fused.safetensors").eval()
    x = torch.randn(spec["inputs"][0]["shape"], generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.allclose(loaded(x), original(x), rtol=1e-3, atol=1e-4)


def test_the_mapping_is_fused_by_its_own_code(tmp_path: Path) -> None:
    (group,) = fuse("mappings/custom_fuser", tmp_path)["groups"]
    assert group["rule"] == "channel_scale:fuse_conv_scale"


def test_tensors_alone_are_claimed_and_need_what_the_spec_says(tmp_path: Path) -> None:
    report = fuse("bare/state_dict", tmp_path)
    assert {group["evidence"] for group in report["groups"]} == {"claimed"}
    assert [group["rule"] for group in report["groups"]] == ["conv_bn", "conv_transpose_bn", "linear_bn"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_wrong_fold_of_it_could_be_seen(example: str) -> None:
    """With mean 0 and variance 1, or gammas of one sign, a wrong fold may look right."""
    state = load_file(CONFIGS / f"{example}.safetensors")
    for name, tensor in state.items():
        if name.endswith("running_var"):
            assert not torch.allclose(tensor, torch.ones(()))
            assert state[name.replace("_var", "_mean")].abs().min() > 0
            gamma = state.get(name.replace("running_var", "weight"))
            assert gamma is None or gamma.min() < 0 < gamma.max()


def test_the_script_writes_the_committed_bytes_again(tmp_path: Path) -> None:
    paths = sorted(
        path
        for folder in ("rules", "rules/adapters", "mappings", "bare")
        for path in (CONFIGS / folder).glob("*.safetensors")
    )
    before = {path: path.read_bytes() for path in paths if not path.name.endswith(".fused.safetensors")}
    script = [sys.executable, str(ROOT / "scripts" / "make_rule_examples"), str(tmp_path)]
    subprocess.run(script, check=True, capture_output=True)
    after = {path: (tmp_path / path.relative_to(CONFIGS)).read_bytes() for path in before}
    assert after == before
    assert all(len(data) < 4096 for data in before.values())
