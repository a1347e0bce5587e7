"""`fusecli inspect` as a person and a program see it."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from fusecli.cli.app import app, main
from fusecli.spec import read_spec
from fusecli.spec.wildcards import bind_groups
from tests.report.outcomes import HOSTILE_NAMES

ROOT = Path(__file__).resolve().parent.parent.parent


def inspect(*words: str | Path, width: int = 80) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, words)], env={"COLUMNS": str(width)})


def unwrapped(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    """A state dict of about a thousand tensors in repeated blocks, with statistics as if trained."""
    stages: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))]
    for channels in (4, 8):
        block = nn.Sequential(nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())
        stages.append(nn.Sequential(*(copy.deepcopy(block) for _ in range(72))))
    state = nn.Sequential(*stages, nn.Linear(8, 10)).state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    torch.save(state, tmp_path / "resnet.pt")
    return tmp_path / "resnet.pt"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Every hostile name as a layer with its norm."""
    state = {}
    for name in HOSTILE_NAMES:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            continue  # refused when the file is opened
        state[f"{name}.0.weight"] = torch.ones(4, 4, 3, 3)
        state |= {
            f"{name}.1.{part}": torch.rand(4) for part in ("weight", "bias", "running_mean", "running_var")
        }
    torch.save({"state_dict": state, **dict.fromkeys(HOSTILE_NAMES, "x")}, tmp_path / "hostile.pt")
    return tmp_path / "hostile.pt"


def test_a_thousand_tensors_are_a_page(resnet: Path) -> None:
    result = inspect(resnet)
    assert result.exit_code == 0
    assert "1,017 tensors" in result.stdout
    lines = result.stdout.splitlines()
    assert len(lines) < 50
    assert any(re.search(r"144 × \*\.\*\.0 +weight \[4\.\.8, 4\.\.8, 3, 3\], bias", line) for line in lines)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_is_wider_than_the_page(width: int, resnet: Path, hostile: Path) -> None:
    for path in (resnet, hostile):
        result = inspect(path, width=width)
        assert result.exit_code == 0
        wide = [line for line in result.stdout.splitlines() if cell_len(line) > width]
        # A path in the command that comes next sticks out: broken, it could not be pasted.
        assert all(str(path) in line for line in wide)


def test_names_are_text(hostile: Path) -> None:
    lines = inspect(hostile).stdout.splitlines()
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.lstrip().startswith("::")]
    assert not [line for line in lines if "##[" in line or "##vso[" in line]
    assert "[red]bold[/red]:bug:" in "".join(lines)


def test_a_guess_is_called_one_and_says_what_may_be_wrong_with_it(resnet: Path) -> None:
    text = unwrapped(inspect(resnet).stdout)
    assert "by key order, 145 of 145 norms may follow a layer" in text
    assert "conv → relu → norm" in text
    assert "Only a run of the model can confirm a pair" in text
    assert "eps of 145 norms (never guessed)" in text
    assert "145 in guessed pairs" in text


def test_the_draft_on_the_page_is_a_spec(resnet: Path, tmp_path: Path) -> None:
    draft = inspect(resnet).stdout.partition("what is wrong\n")[2].partition("\n\n")[0]
    (tmp_path / "fuse.yaml").write_text(draft)
    names = list(json.loads(inspect(resnet, "--json").stdout)["modules"])
    bound = bind_groups(read_spec(tmp_path / "fuse.yaml"), [module["path"] for module in names])
    assert len(bound) == 145


def test_many_ties_are_some_names_and_a_count(tmp_path: Path) -> None:
    shared = torch.ones(2, 3)
    torch.save({f"layer{number}.weight": shared for number in range(50)}, tmp_path / "tied.pt")
    text = unwrapped(inspect(tmp_path / "tied.pt").stdout)
    assert "tied layer0.weight, layer1.weight, layer2.weight and 47 more: one and the same memory" in text


def test_no_guess_where_no_norm_is(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "fc.safetensors")
    result = inspect(tmp_path / "fc.safetensors")
    assert result.exit_code == 0
    assert "To fuse it" not in result.stdout
    assert "nothing to fold" in result.stdout


def test_what_makes_a_fold_impossible_or_invisible_stands_out(tmp_path: Path) -> None:
    state = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    ).state_dict()
    state["3.running_var"] = torch.tensor([1.0, -2.0, 1.0, float("nan")])
    torch.save(state, tmp_path / "bad.pt")
    text = unwrapped(inspect(tmp_path / "bad.pt").stdout)
    assert "unfit 3: running_var is not finite in 1 of 4 channels; running_var is negative in 1 of 4" in text
    assert "mean 0 and variance 1 everywhere in 1 of 2 (1)" in text


def test_an_artifact_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    fused = tmp_path / "fused.safetensors"
    words = ["fuse", "configs/rules/conv_bn_relu.safetensors", "--spec", "configs/rules/conv_bn_relu.yaml"]
    assert CliRunner().invoke(app, [*words, "-q", "-o", str(fused)]).exit_code == 0
    result = inspect(fused)
    assert result.exit_code == 0
    text = unwrapped(result.stdout)
    assert "Artifact of fusecli folded groups 1: 1 × conv_bn_relu conv + bn + relu" in text
    assert "fused already" in text
    assert "guess" not in text
    artifact = json.loads(inspect(fused, "--json").stdout)["artifact"]
    assert artifact["groups"] == [["conv", "bn", "relu"]]
    assert len(artifact["input_sha256"]) == 64


def test_no_pair_is_proposed_for_the_norms_left_in_an_artifact(tmp_path: Path) -> None:
    """fuse does not take an artifact: other groups are fused from the original checkpoint."""
    (tmp_path / "one.yaml").write_text("groups: [{modules: [stem.conv, stem.bn], eps: 1.0e-5, kind: conv2d}]")
    fused = tmp_path / "one.safetensors"
    words = ["fuse", str(ROOT / "configs/bare/state_dict.safetensors"), "--spec", str(tmp_path / "one.yaml")]
    assert CliRunner().invoke(app, [*words, "-q", "-o", str(fused)]).exit_code == 0
    report = json.loads(inspect(fused, "--json").stdout)
    assert len(report["norms"]) == 2
    assert report["candidates"] == []
    assert report["draft"] == ""
    assert "To fuse it" not in inspect(fused).stdout


def test_json_has_all_the_facts(resnet: Path) -> None:
    report = json.loads(inspect(resnet, "--json").stdout)
    assert list(report)[:4] == ["schema_version", "command", "status", "exit_code"]
    assert report["command"] == "inspect"
    assert len(report["modules"]) == 291
    assert len(report["norms"]) == len(report["candidates"]) == 145
    assert report["candidates"][0] == {"layer": "0.0", "norm": "0.1", "channels": 8, "transposed": False}
    assert report["draft"].startswith("version: 1\n")


def test_json_is_safe_to_print(hostile: Path) -> None:
    text = inspect(hostile, "--json").stdout
    assert text.replace("\n", "").isprintable()
    assert "##[" not in text
    assert {module["path"] for module in json.loads(text)["modules"]} >= {f"{HOSTILE_NAMES[1]}.0"}


@pytest.mark.parametrize("words", [[], ["--json"], ["--key", "x"]])
def test_a_pickled_module_is_refused_with_the_consent_it_would_need(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    monkeypatch.setattr(sys, "argv", ["fusecli", "inspect", str(tmp_path / "module.pt"), *words])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capfd.readouterr()
    assert left.value.code == 3
    assert "--allow-pickle" in err
    if "--json" in words:
        report = json.loads(out)
        assert (report["status"], report["exit_code"]) == ("error", 3)
        assert "--allow-pickle" in report["problems"][0]
    else:
        assert out == ""
